"""`invoke export`: find the run, make its model again, write, load what was written, compare,
and only then give it its name.
"""

import gc
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finrepro.errors import DiskFull, EnvironmentFault, UsageError, unknown
from finrepro.evidence.files import is_full
from finrepro.evidence.manifest import write_manifest
from finrepro.evidence.place import Place
from finrepro.exporting.layout import ExportLayout, layout_of
from finrepro.exporting.recorded import FORMATS, RecordedRun, find_run
from finrepro.runtime import process
from finrepro.runtime.modes import make_readable


def export(run_id: str, export_format: str, out: Path | None, place: Place) -> Path:
    """Export a run of the store; the folder that was made.

    It is written under another name beside its place, and renamed when its logits equal the run's;
    whatever happens before, nothing is left. Raises the errors of `find_run`,
    `rebuild.starting_point` and `verify.check`; `UsageError` when the place is taken.
    """
    if export_format not in FORMATS:
        raise unknown("--format", export_format, FORMATS)
    if not run_id:
        raise UsageError("--run is needed: the id of a finished run.")
    recorded = find_run(place.store, run_id, export_format)
    target = out or place.store.root / "exports" / f"{run_id}-{export_format}"
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already: say another with --out, or move it away.")
    from finrepro.exporting.rebuild import on_its_base

    with _new_folder(target) as partial, on_its_base(recorded) as recorded:
        _fill(recorded, layout_of(recorded.spec, export_format), partial, place)
    print(f"exported to {target}")
    return target


def _fill(recorded: RecordedRun, planned: ExportLayout, partial: Path, place: Place) -> None:
    """Write everything into `partial`, verified."""
    spec = recorded.spec
    process.quiet_environment()
    device = process.setup(spec.seed, spec.threads)
    # DeepSpeed, which Transformers imports, then need not say what it found.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("bitsandbytes").setLevel("ERROR")  # a notice at each int8 layer
    from finrepro.exporting import answers, rebuild, verify, write
    from finrepro.exporting.card import model_card

    print(f"{recorded.run_id} {spec.label}: as {planned.format}")
    start = rebuild.starting_point(recorded, place, planned.format)
    if planned.format == "peft":
        write.check_adapter(recorded, planned)
    prompts = rebuild.encoded_prompts(start.tokenizer)
    print(f"making the run's model again, on a {device.type}")
    model: Any = None
    if planned.format == "base" or not recorded.is_whole_model:
        model = rebuild.base_model(recorded, start, device)
    answers_note = ""
    expected = untrained = rebuild.logits(model, prompts) if model is not None else None
    if planned.base is not None and planned.format != "merged":
        print("writing the base" + (f": {planned.why_own}" if planned.why_own else ""))
        write.write_base(spec, model, start.tokenizer, partial / planned.base)
    if planned.shift:
        write.write_shift(model, partial / planned.shift)
    if planned.format != "base":
        model = rebuild.trained_model(recorded, model, device)
        expected = rebuild.logits(model, prompts)
        answers_note = answers.check(recorded, place, model, start.tokenizer)
        print(answers_note)
    if planned.format == "merged":
        print("merging, a layer at a time")
        write.write_merged(recorded, start, model, partial)
    elif planned.adapter:
        write.write_adapter(recorded, partial / planned.adapter)
    assert expected is not None
    effect = (
        verify.difference(expected, untrained).relative
        if untrained and planned.format != "base"
        else None
    )
    del model
    gc.collect()
    print("loading what was written with Transformers and PEFT alone")
    exported = verify.reload(spec, partial, planned, start.folder, device, prompts)
    difference = verify.check(spec, expected, exported)
    moved = f" (what was trained moves them by {effect:.3g})" if effect is not None else ""
    print(
        f"logits equal the run's: largest difference {difference.largest:.3g}, "
        f"{difference.relative:.3g} of their length{moved}"
    )
    if effect is not None and effect <= verify.TOLERANCE[spec.model.dtype]:
        print(
            "note: the run's training moves them by no more than rounding may: "
            "this comparison says little of it"
        )
    (partial / "README.md").write_text(
        model_card(recorded, planned, difference, effect, answers_note), encoding="utf-8"
    )
    make_readable(partial)
    write_manifest(partial)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, renamed to it at the end; removed on any error, and on
    SIGTERM as on Ctrl-C.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            if os.path.lexists(target):
                raise UsageError(
                    f"{target} has come into being in the meantime: say another with --out."
                )
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise EnvironmentFault(f"{target}: cannot be made: {reason}.") from None
    except Exception as error:
        if is_full(error):
            raise DiskFull(f"{target}: cannot be made: no space left.") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt

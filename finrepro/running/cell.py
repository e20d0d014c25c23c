"""The walk of one cell, from its spec to its sealed result. `python -m finrepro.running.cell`
runs one cell and is idempotent.
"""

import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.spec import RunSpec
from finrepro.data.arriving.growing import Waiting
from finrepro.errors import (
    CellFailed,
    EnvironmentFault,
    FinreproError,
    Unavailable,
    UsageError,
    unavailable_if_faulty,
)
from finrepro.evidence import provenance, store
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.place import Place
from finrepro.evidence.result import header, seal_unfinished
from finrepro.kinds import adapter_of
from finrepro.running import base, feeding, inputs
from finrepro.running.launch import parse, resolve
from finrepro.running.seal import measured_rate, median_step
from finrepro.running.text import corpora_facts, corpora_identity, open_corpora, while_waiting
from finrepro.runtime import memory, process, ranks
from finrepro.training import compilation

if TYPE_CHECKING:
    pass

Report = Callable[[dict[str, Any]], None]
EXIT_CODES = {store.DONE: 0, store.SKIPPED: EnvironmentFault.exit_code}


def run_cell(
    spec: RunSpec, place: Place, report: Report, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    """Walk one cell and seal its result; the content of result.json.

    A defect or a divergence is sealed too, as `failed` or `diverged` with its reason, and a base
    that cannot be used as `skipped`. Raises `EnvironmentFault` (nothing is written) and
    `Interrupted` (a checkpoint is).
    """
    from finrepro.errors import Diverged, Interrupted

    started, traced = time.time(), None
    try:
        with feeding.fed(spec, place) as tend:
            return walk(
                spec,
                place,
                report,
                stop_requested,
                started,
                while_waiting(report, stop_requested, tend),
            )
    except Unavailable as error:
        status, reason = store.SKIPPED, str(error)
    except (EnvironmentFault, Interrupted):
        raise
    except Diverged as error:
        status, reason = store.DIVERGED, str(error)
    except (
        Exception
    ) as error:  # whatever it is, it costs one cell: its traceback goes into the result
        status, reason = (
            store.FAILED,
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
        traced = traceback.format_exc()
        print(
            traced, file=sys.stderr
        )  # into the log: of several ranks only the first one's is kept with the result
    if not ranks.current().is_main:
        return {"status": status, "reason": reason}
    return seal_unfinished(spec, place.store, status, reason, started, traced)


def walk(
    spec: RunSpec,
    place: Place,
    report: Report,
    stop_requested: Callable[[], bool],
    started: float,
    waiting: Waiting,
) -> dict[str, Any]:
    """setup -> data -> model -> train -> evaluate -> record, read from top to bottom."""
    device = process.setup(spec.seed, spec.threads)
    compilation.expect_compiler(spec, device)
    memory.reset_peak_memory(device)

    from finrepro.data.tokens import tokenizer_digest
    from finrepro.evaluation import quantized
    from finrepro.evaluation.evaluate import evaluate
    from finrepro.models.build import build
    from finrepro.runtime.monitor import Monitor
    from finrepro.runtime.phases import Phases
    from finrepro.training import layout as layouts
    from finrepro.training.checkpoint import Control
    from finrepro.training.engines.deepspeed import collect_trained, inference
    from finrepro.training.loop import train

    report({"event": "phase", "phase": "data"})
    phases = Phases(device)
    datasets = inputs.load_data(spec, place)
    corpora = open_corpora(spec, place, waiting)
    folder, tokenizer, origin = base.open_base(spec, place)
    made_from = base.base_facts(spec, place, folder)
    text = corpora_identity(spec, corpora)
    encoded = inputs.training_examples(spec, datasets, tokenizer, corpora)

    report({"event": "phase", "phase": "model"})
    phases.begin("load")
    with unavailable_if_faulty():
        built = build(spec, folder, device)

    checkpoints = place.store.checkpoints(spec.run_id)
    with Monitor() as monitor:
        made_by = json.dumps(
            [provenance.source_digest(), provenance.lock_digest(), made_from, text]
        )
        control = Control(report, stop_requested, checkpoints, made_by, phases=phases)
        settled, layout = layouts.settled(spec, built.model, encoded, device, control)
        report({"event": "phase", "phase": "train"})
        trained = train(built.model, encoded, settled, device, control)

        report({"event": "phase", "phase": "evaluate"})
        phases.begin("evaluate")
        began = time.monotonic()
        scores, rows, num_scored = [], [], 0
        with inference(built.model, spec.train, device):
            for each in spec.tasks:
                examples = datasets[each.dataset.name].splits[spec.evaluation.split]
                if ranks.current().is_main:
                    place.store.log_scoring(spec, each.task.name)
                evaluated = evaluate(
                    built.model,
                    tokenizer,
                    each,
                    examples,
                    spec.evaluation,
                    spec.train.max_seq_len,
                    partial(scored, report),
                )
                scores += evaluated.scores if spec.weights != "random" else []
                rows += evaluated.rows
                num_scored += len(examples)
        evaluation_seconds = time.monotonic() - began

    report({"event": "phase", "phase": "record"})
    rate = measured_rate(spec, device)
    phases.begin("save")
    collect_trained(built.model)
    phases.over_ranks()
    if not ranks.current().is_main:
        return {"status": store.DONE, "reason": None}
    with place.store.new_run(spec.run_id) as target:
        (target / "weights").mkdir()
        adapter_of(spec.adapter).export(built.model, target / "weights")
        if spec.weights == "scratch":
            tokenizer.save_pretrained(target / "weights")
        peaks = phases.costs()  # what is stored again and scored below is no part of the run
        write_lines(target / "loss.jsonl", trained.losses)
        write_lines(target / "predictions.jsonl", rows)
        write_lines(target / "system.jsonl", monitor.samples)
        files = sorted((target / "weights").glob("*.safetensors"))
        stored_bytes, remarks = {}, []
        for quantizer in quantized.possible(spec):
            report({"event": "phase", "phase": f"evaluate as {quantizer.name}"})
            try:
                again, stored_bytes[quantizer.name] = quantized.scores(
                    spec, quantizer, target / "weights", datasets, tokenizer, device
                )
            except Exception as error:  # what was trained is whole without it
                remarks.append(
                    f"not scored in {quantizer.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                )
                continue
            scores += again
        result = header(spec, store.DONE, None, started, device.type, layout) | {
            "scores": scores,
            "costs": {
                "total_params": built.base_parameters,
                "trainable_params": built.trainable_parameters,
                "base_bytes": built.base_bytes,
                "trained_file_bytes": sum(path.stat().st_size for path in files),
                **peaks,
                "train_seconds": trained.seconds,
                "train_tokens": trained.tokens,
                "supervised_tokens": trained.supervised_tokens,
                "useful_token_share": trained.tokens / trained.computed_tokens
                if trained.computed_tokens
                else None,
                "tokens_per_second": trained.tokens / trained.seconds if trained.seconds else None,
                "step_seconds": median_step(trained.losses),
                "matmul_flops": rate,
                **{f"bytes_as_{name}": size for name, size in stored_bytes.items()},
                "final_loss": trained.losses[-1]["loss"] if trained.losses else None,
                "evaluation_seconds": evaluation_seconds,
                "evaluated_examples": num_scored,
            },
            "data": {
                **inputs.data_facts(datasets),
                "corpora": corpora_facts(spec, corpora),
                "base": made_from,
                "tokenizer": {
                    "origin": origin,
                    "sha256": tokenizer_digest(folder or target / "weights"),
                },
                "times_scored": place.store.times_scored(spec),
            },
        }
        result["cell"] |= {
            "compilation": trained.compilation,
            "notes": result["cell"]["notes"] + remarks,
        }
        write_json(target / "result.json", result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def scored(report: Report, done: int, total: int) -> None:
    """Report how far an evaluation is."""
    report({"event": "phase", "phase": f"evaluate {done}/{total}"})


def check_launch(spec: RunSpec) -> None:
    """Raise `UsageError` when the cell is refused, or this launch has another number of ranks
    than the cell has devices.
    """
    refused, launched = refusal(spec), ranks.current().world_size
    if refused:
        raise UsageError(f"{spec.label}: {refused}.")
    if launched != spec.world_size:
        raise UsageError(
            f"{spec.label} runs on {spec.world_size} device(s), and {launched} process(es) were started: "
            "take the command that --plan prints, or say --devices."
        )


def main(arguments: list[str] | None = None) -> int:
    """Run one cell as a process of its own: what launchers start, one a rank. Exit codes as
    everywhere.
    """
    from finrepro.errors import Interrupted

    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal sends it to everybody; who started us decides
    process.die_with_parent()

    def emit(event: dict[str, Any]) -> None:
        if ranks.current().is_main:
            print(json.dumps(event), flush=True)

    try:
        message, place = parse(arguments)
        spec = resolve(message)
        check_launch(spec)
        result: dict[str, Any] = {"status": store.DONE, "reason": None}
        if place.store.state(spec) != store.DONE:
            result = run_cell(spec, place, emit, lambda: bool(stop))
        emit({"event": "result", "status": result["status"], "reason": result["reason"]})
        if result["status"] != store.DONE and not ranks.current().is_main:
            print(
                json.dumps(
                    {"event": "rank", "rank": ranks.current().rank, "reason": result["reason"]}
                ),
                flush=True,
            )
        if result["status"] == store.DONE:
            ranks.leave_process_group()
        return EXIT_CODES.get(result["status"], CellFailed.exit_code)
    except FinreproError as error:
        emit({"event": "fault", "reason": str(error), "exit_code": error.exit_code})
        print(f"finrepro: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        emit({"event": "interrupted", "reason": str(error)})
        return 130


if __name__ == "__main__":
    process.quiet_environment()
    process.end(main())

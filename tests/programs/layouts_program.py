"""The ranks of tests/training/test_layouts.py: `python layouts_program.py folder`. The first one
pads slowly, the second fills bins more slowly.
"""

import json
import sys
from pathlib import Path

from finrepro.runtime import process, ranks

process.quiet_environment()

from fixtures.model import CPU, make, random_examples, spec_of  # noqa: E402
from test_layouts import Clock, control  # noqa: E402

from finrepro.data.batches import COLLATE  # noqa: E402
from finrepro.training import layout as layouts  # noqa: E402

folder = Path(sys.argv[1])
process.setup(0, 1)
rank = ranks.current().rank
layouts.time = clock = Clock()
slow = ("padded", "bins")[rank]
COLLATE[slow] = clock.slowed(COLLATE[slow], (0.1, 0.3)[rank])
spec = spec_of("gpt2_127m_mini", "lora_r8", layout="fastest", max_steps=4)
model = make(spec).model
found = [
    layouts.choose_layout(spec, model, random_examples(0, 30), CPU, control(folder))[1]
    for _ in range(2)
]
(folder / f"rank{rank}.json").write_text(json.dumps(found))
ranks.leave_process_group()
process.end(0)

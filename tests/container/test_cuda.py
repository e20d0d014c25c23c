"""What the CUDA target has beyond the other one, as far as a machine without a GPU can tell."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.container

# What is compiled at run time lies in /tmp and has to run from there.
COMPILING = "/tmp:exec"
ON_GPU = ("--env", "DS_ACCELERATOR=cuda")  # what DeepSpeed takes itself for


@pytest.fixture(scope="module")
def cuda(run: Any, lock: str) -> Any:
    """`run`, where the image under test is the CUDA target."""
    if not lock.endswith("cuda.lock"):
        pytest.skip("FINREPRO_IMAGE names the cpu target")
    return run


def answer(cuda: Any, program: str, **options: Any) -> Any:
    """What a Python program in the image prints last, as JSON."""
    done = cuda("python", "-W", "ignore", "-c", program, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


VERSIONS = """
import json, accelerate, deepspeed, peft, torch, transformers, triton
from deepspeed.ops.op_builder.builder import installed_cuda_version
print(json.dumps([torch.version.cuda, torch.cuda.is_available(), installed_cuda_version()]))
"""


def test_torch_and_the_compiler_are_of_one_cuda(cuda: Any) -> None:
    """DeepSpeed compiles nothing for a torch of another CUDA than nvcc's."""
    assert answer(cuda, VERSIONS, options=ON_GPU) == ["13.0", False, [13, 0]]


def test_deepspeed_finds_no_compiler_but_the_locked_one(cuda: Any) -> None:
    """The test above can fail."""
    done = cuda(
        "python", "-W", "ignore", "-c", VERSIONS, options=(*ON_GPU, "--env", "CUDA_HOME=/nowhere")
    )
    assert done.returncode != 0
    assert "MissingCUDAException" in done.stderr


def test_bitsandbytes_has_its_cuda_library_and_stores_nf4_without_a_gpu(cuda: Any) -> None:
    program = """
import ctypes, json, pathlib, bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
ctypes.CDLL(str(pathlib.Path(bitsandbytes.__file__).with_name("libbitsandbytes_cuda130.so")))
weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
stored, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
error = (dequantize_4bit(stored, state) - weight).norm() / weight.norm()
print(json.dumps([stored.numel(), error.item()]))
"""
    size, error = answer(cuda, program)
    assert size == 256 * 256 // 2
    # Sixteen levels at the quantiles of a normal distribution, blocks of 64: about a tenth of its
    # spread.
    assert 0.08 < error < 0.11


def test_nvcc_compiles_for_sm_90(cuda: Any) -> None:
    script = """
cd /tmp &&
echo '__global__ void add(float *a) { a[threadIdx.x] += 1; }' > a.cu &&
echo 'int main() { add<<<1, 32>>>(nullptr); }' >> a.cu &&
nvcc -arch=sm_90 -o a a.cu && ./a &&
nvcc -arch=sm_90 -cubin -o a.cubin a.cu && od -A n -t u2 -j 18 -N 2 a.cubin
"""
    done = cuda("sh", "-c", script, scratch=COMPILING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["190"]  # EM_CUDA, the machine in the ELF header


def test_deepspeed_compiles_and_loads_a_cuda_operator(cuda: Any) -> None:
    program = """
import json
from deepspeed.ops.op_builder import FusedAdamBuilder
names = dir(FusedAdamBuilder().load())
print(json.dumps(sorted(name for name in names if name.startswith("multi"))))
"""
    target = (*ON_GPU, "--env", "TORCH_CUDA_ARCH_LIST=9.0", "--env", "MAX_JOBS=2")
    assert answer(cuda, program, options=target, scratch=COMPILING) == ["multi_tensor_adam"]


def test_one_nf4_cell_runs_without_a_gpu(cuda: Any, new_store: Any) -> None:
    """Trained by DeepSpeed, stored by bitsandbytes, adapted by PEFT, all of them built for CUDA."""
    store = new_store()
    command = ("invoke", "reproduce", "--table", "3", "--quick", "--only", "gpt2*-nf4-*")
    done = cuda(*command, options=("-v", f"{store}:/srv/finrepro"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = [json.loads(path.read_text()) for path in store.glob("results/runs/*/result.json")]
    assert {result["status"] for result in results} == {"done"}
    assert any("-nf4-" in result["label"] for result in results)

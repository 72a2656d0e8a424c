"""Started by test_adam16_kernel.py: triton decides once a process whether it interprets kernels or compiles them.

TRITON_INTERPRET=1 python tests/engine/adam16_kernel_checks.py bits
python tests/engine/adam16_kernel_checks.py assembly

Prints JSON: name of a combination -> what differed between the two forms; or the PTX that it became.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dalle_scale.engine import adam16
from dalle_scale.engine.adam16 import AdamW16
from dalle_scale.engine.adam16_step import StepCoefficients

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDINGS = ("stochastic", "compensated", "nearest")
COMBINATIONS = [
    *itertools.product(("bf16", "fp16"), ("paper", "bf16", "fp32"), ROUNDINGS),
    ("fp32", "paper", ROUNDINGS[0]),
]
COUNT, CHUNK, STEPS = 2100, 1100, 3  # two chunks, of two blocks and of one, none of them full
VARIANTS = {  # formats of mean, variance and weights that are compiled
    "bf16-paper-stochastic": (*adam16._MOMENTS["paper"], adam16.BFLOAT16),
    "fp16-paper-compensated": (*adam16._MOMENTS["paper"], adam16.FLOAT16),
    "bf16-bf16-nearest": (*adam16._MOMENTS["bf16"], adam16.BFLOAT16),
    "fp16-fp32-stochastic": (*adam16._MOMENTS["fp32"], adam16.FLOAT16),
    "fp32": (None, None, None),
}
FAR = (3 << 32) - 700  # where the low 32 bits of a position run over


def spread(seed: int, count: int, low: float, high: float) -> Tensor:
    """fp32 of both signs with exponents over a range, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.empty(count).uniform_(low, high, generator=generator).exp2()
    return sizes * torch.randint(-8, 9, (count,), generator=generator).sign()


def advanced(dtype: torch.dtype, states: Any, rounding: Any) -> dict[str, Tensor]:
    """Weights and states after some steps, by name: also what under- and overflows, infinity and NaN."""
    tensors = [nn.Parameter(spread(seed, count, -20, 8).to(dtype)) for seed, count in ((0, COUNT), (1, 1))]
    groups = [
        {"params": tensors[:1], "weight_decay": 0.1, "gradient_divisor": 3.0, "lr": 0.3},
        {"params": tensors[1:], "eps": 1e-6},
    ]
    optimizer = AdamW16(groups, lr=0.01, betas=(0.9, 0.95), states=states, rounding=rounding, seed=5)
    for step, tensor in itertools.product(range(STEPS), tensors):
        tensor.grad = spread(10 + step, tensor.numel(), -60, 16).to(dtype)
        tensor.grad[100:103] = torch.tensor([torch.inf, -torch.inf, torch.nan])[: len(tensor.grad[100:103])]
        if tensor is tensors[-1]:
            optimizer.step()
    found = {}
    for index, tensor in enumerate(tensors):
        state = optimizer.state[tensor]
        forms = optimizer.moments if dtype != torch.float32 else (None, None)
        found[f"weights {index}"] = tensor.detach().float()
        found |= {
            f"{name} {index}": adam16._read(adam16._opened(state[name], form), form)
            for name, form in zip(("mean", "variance"), forms, strict=True)
        }
        if "compensation" in state:
            found[f"compensation {index}"] = state["compensation"].float()
    return found


def far_away() -> dict[str, Tensor]:
    """One update at positions beyond 2^32, with the largest and the smallest keys."""
    weights, gradient = spread(2, COUNT, -4, 4).bfloat16(), spread(3, COUNT, -9, 0).bfloat16()
    moments = [torch.zeros(COUNT, dtype=torch.int16) for _ in range(2)]
    forms = (*adam16._MOMENTS["paper"], adam16.BFLOAT16)
    optimizer = AdamW16([nn.Parameter(weights)], lr=0.01)
    numbers = optimizer._numbers(1, optimizer.param_groups[0])
    update = adam16._update_on(weights.device)
    update(weights, gradient, *moments, None, forms, ((1 << 32) - 1, 1, 1 << 31), FAR, numbers)
    return {"weights": weights.float(), "mean": moments[0].float(), "variance": moments[1].float()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> str:
    """Which bits differ, NaN being one number; "" where none does."""
    assert got.keys() == want.keys()
    for name in want:
        left, right = (torch.where(one.isnan(), torch.nan, one).view(torch.int32) for one in (got[name], want[name]))
        if wrong := (left != right).nonzero().flatten().tolist():
            first = wrong[0]
            return f"{len(wrong)} of {name}; at {first}: {got[name][first]} is not {want[name][first]}"
    return ""


def bits() -> dict[str, str]:
    """Of every combination: what differs between the kernel, interpreted, and the plain form."""
    from dalle_scale.engine import adam16_kernel

    adam16.CHUNK_ON_CPU = CHUNK
    rules = {"-".join(names): (advanced, DTYPES[names[0]], *names[1:]) for names in COMBINATIONS} | {"far": (far_away,)}
    want = {name: rule[0](*rule[1:]) for name, rule in rules.items()}
    adam16._update_on = lambda device: adam16_kernel.update
    return {name: difference(rule[0](*rule[1:]), want[name]) for name, rule in rules.items()}


def assembly() -> dict[str, str]:
    """PTX for an H100, of every format; "fused": what it would be without the kernel's options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dalle_scale.engine import adam16_kernel as module

    found = {}
    for name, forms in (*VARIANTS.items(), ("fused", VARIANTS["fp32"])):
        rounding = name.rpartition("-")[2]
        noisy = [form is not None and rounding != "nearest" for form in forms[:2]] + [rounding == "stochastic"]
        pointers = ["*fp32" if form is None else "*i16" for form in (*forms[2:] * 3, *forms[:2])]
        kinds = [*pointers, "i32", "i32", *["i32"] * 3, *["fp32"] * len(StepCoefficients._fields)]
        names = module._kernel.arg_names
        known: dict[str, Any] = dict(zip(names[-4:], (*forms, module._BLOCK), strict=True))
        known |= {key: None for key, noise in zip(names[7:10], noisy, strict=True) if not noise}
        known |= {} if rounding == "compensated" else {"compensation": None}
        signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(known, "constexpr")
        aligned = {(at,): [["tt.divisibility", 16]] for at in range(6) if names[at] not in known}
        source = ASTSource(
            module._kernel, signature, {(names.index(key),): value for key, value in known.items()}, aligned
        )
        options = {"enable_fp_fusion": True} if name == "fused" else module.OPTIONS
        found[name] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"bits": bits, "assembly": assembly}[sys.argv[1]]()))

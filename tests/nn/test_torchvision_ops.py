"""torchvision and what needs it can be imported whether or not its compiled operators fit; each in a fresh process."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_torchvision_can_be_imported():
    """True where its operators fit torch and where they do not: declared once, and only if they were missing."""
    output = run(
        "import torch; from dalle_scale.nn.torchvision_compat import declare_missing_operators as declare\n"
        "first = declare(); import torchvision; from torchvision.transforms import v2\n"
        "print(bool(first) == torchvision.extension._has_ops(), declare(), torch.ops.torchvision.nms.default._schema)"
    )
    assert output == "False [] torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@pytest.mark.parametrize("present", [(), ("nms",), ("nms", "qnms")])
def test_only_what_is_missing_is_declared(present):
    """Operators that somebody has declared stay as they are."""
    output = run(
        "import torch; from dalle_scale.nn import torchvision_compat as ops\n"
        "ops._load_compiled = lambda folders: None\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        f"for name in {present}: library.define(ops._SCHEMAS[name])\n"
        "print(*ops.declare_missing_operators())"
    )
    assert output.split() == [name for name in ("nms", "qnms") if name not in present]


def test_nothing_happens_without_torchvision():
    output = run(
        "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        "from dalle_scale.nn.torchvision_compat import declare_missing_operators\n"
        "print(declare_missing_operators())"
    )
    assert output == "[]"


def test_importing_the_stage_is_cheap():
    output = run(
        "import sys, dalle_scale.stages.clip, dalle_scale.sampling.rerank\n"
        "print([name for name in ('open_clip', 'torchvision', 'transformers', 'timm') if name in sys.modules])"
    )
    assert output == "[]"

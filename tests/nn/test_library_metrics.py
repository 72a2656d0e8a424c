"""SSIM, LPIPS and the Fréchet distance beside torchmetrics' and torch-fidelity's, and why the project has its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_scale.evaluation.metrics.distribution import frechet_distance
from dalle_scale.evaluation.metrics.ssim import WINDOW, ssim
from dalle_scale.nn.lpips import Lpips, PerceptualConfig, build_lpips
from dalle_scale.nn.torchvision_compat import declare_missing_operators

declare_missing_operators()  # both libraries import torchvision, which may not fit the installed torch
torchmetrics = pytest.importorskip("torchmetrics")


def noisy_pair() -> tuple[Tensor, Tensor]:
    """Smooth images and the same with noise, uint8 [2, 3, 40, 36]."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4, generator=generator) * 255, (40, 36))
    other = smooth + 20 * torch.randn(smooth.shape, generator=generator)
    return smooth.to(torch.uint8), other.clamp(0, 255).to(torch.uint8)


def test_ssim_of_windows_inside_the_image() -> None:
    """torchmetrics also averages windows over reflected borders, which Eq. 13 to 16 of the paper do not have, and takes
    no bytes: its number is another one."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, references = noisy_pair()
    ours = ssim(images, references)
    given = images.double(), references.double()
    theirs, full = structural_similarity_index_measure(
        *given, data_range=255.0, reduction="none", return_full_image=True
    )
    margin = WINDOW // 2
    inside = full[..., margin:-margin, margin:-margin].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, inside, rtol=1e-9, atol=1e-9)
    assert (ours - theirs).abs().max() > 1e-3
    with pytest.raises(RuntimeError):
        structural_similarity_index_measure(images, references, data_range=255.0)


def same_weights(ruler: Lpips) -> torch.nn.Module:
    """torchmetrics' net with the weights of ours; its own way to them is a download, or random ones."""
    from torchmetrics.functional.image.lpips import _LPIPS

    net: torch.nn.Module = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, use_dropout=False)
    names = [name for name in net.state_dict() if name.startswith("net.slice")]
    state = dict(zip(names, ruler.features.state_dict().values(), strict=True))
    for number, head in enumerate(ruler.heads):
        state |= {f"{prefix}{number}.model.0.weight": head[None, :, None, None] for prefix in ("lin", "lins.")}
    net.load_state_dict(state)
    return net


def test_lpips_has_the_librarys_values() -> None:
    ruler = build_lpips(PerceptualConfig(kind="random"))
    first, second = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    torch.testing.assert_close(ruler(first, second), same_weights(ruler)(first, second).flatten(), rtol=1e-3, atol=1e-6)


def test_lpips_of_the_library_takes_files_that_do_not_fit(tmp_path: Path) -> None:
    """Heads of another net leave random numbers in place without a word; ours refuses (test_perceptual.py). In 16 bits
    under autocast it computes in 16 bits; ours stays fp32."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.save({"of another net": torch.zeros(1)}, tmp_path / "heads.pth")
    net = _LPIPS(net="vgg", pnet_rand=True, use_dropout=False, model_path=str(tmp_path / "heads.pth"))
    image = torch.zeros(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.net(image)[0].dtype == torch.bfloat16
        assert build_lpips(PerceptualConfig(kind="random"))(image, image).dtype == torch.float32


def moments(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    features = torch.randn(count, 32, generator=generator, dtype=torch.float64) @ mixing + seed
    return features.mean(dim=0), torch.cov(features.T)


def test_frechet_distance_has_the_librarys_value() -> None:
    from torchmetrics.image.fid import _compute_fid

    first, second = moments(0, 400), moments(1, 300)
    assert frechet_distance(*first, *second) == pytest.approx(float(_compute_fid(*first, *second)), rel=1e-9)


def test_frechet_distance_of_few_samples() -> None:
    """A covariance of fewer samples than features is singular. Of N(m, C) and N(m, 4 C) the distance is tr C: ours has
    it to twelve digits, torchmetrics' and torch-fidelity's to seven, by square roots of rounding errors."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torchmetrics.image.fid import _compute_fid

    mean, covariance = moments(0, 12)
    exact = float(covariance.trace())
    first, second = ({"mu": mean.numpy(), "sigma": (factor * covariance).numpy()} for factor in (1, 4))
    [theirs] = fid.fid_statistics_to_metric(first, second, False).values()
    assert frechet_distance(mean, covariance, mean, 4 * covariance) == pytest.approx(exact, rel=1e-12)
    for found in (float(_compute_fid(mean, covariance, mean, 4 * covariance)), theirs):
        assert found == pytest.approx(exact, rel=1e-5)

"""The quantizer beside another library's, over steps: codes, codebook, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig

VOCAB, WIDTH, BETA = 16, 6, 0.25


def features(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(3, WIDTH, 4, 4, generator=generator) + 0.1 * step).requires_grad_()


@pytest.mark.parametrize(("cosine", "rotation"), [(False, False), (True, False), (False, True)])
def test_ema_codes_move_as_theirs(cosine, rotation):
    torch.manual_seed(0)
    config = QuantizerConfig(vocab=VOCAB, commitment=BETA, ema_decay=0.9, cosine=cosine, rotation=rotation)
    ours = Quantizer(config, WIDTH).train()
    theirs = VectorQuantize(
        dim=WIDTH, codebook_size=VOCAB, decay=0.9, commitment_weight=BETA, accept_image_fmap=True, eps=1e-9,
        use_cosine_sim=cosine, rotation_trick=rotation, sync_codebook=False,
    ).train()  # fmt: skip
    # theirs begins with a count of one vector a code, which ours leaves out
    codebook = theirs._codebook
    start = torch.nn.functional.normalize(torch.randn(VOCAB, WIDTH), dim=-1)
    for table in (ours.codebook, ours.ema_sums, codebook.embed[0], codebook.embed_avg[0]):
        table.data.copy_(start)
    for counts in (ours.ema_counts, ours.mass, codebook.cluster_size):
        counts.data.fill_(1.0)
    for step in range(12):
        mine, other = features(step), features(step)
        quantized = ours(mine)
        values, codes, loss = theirs(other)
        assert torch.equal(quantized.codes, codes)
        torch.testing.assert_close(quantized.values, values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quantized.loss.mean(), loss.sum(), rtol=1e-4, atol=1e-6)
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(99))
        ((quantized.values * weights).sum() + quantized.loss.mean()).backward()
        ((values * weights).sum() + loss.sum()).backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
        ours.after_step(step)
        torch.testing.assert_close(ours.codebook, codebook.embed[0], rtol=1e-4, atol=1e-5)
    assert (ours.codebook - start).abs().max() > 0.1, "the codes moved"


def test_codebook_loss_is_theirs():
    torch.manual_seed(0)
    ours = Quantizer(QuantizerConfig(vocab=VOCAB, commitment=BETA, update="loss"), WIDTH).train()
    theirs = VectorQuantize(
        dim=WIDTH, codebook_size=VOCAB, learnable_codebook=True, ema_update=False, commitment_weight=1.0,
        commitment_use_cross_entropy_loss=False, accept_image_fmap=True,
    ).train()  # fmt: skip
    theirs._codebook.embed.data[0] = torch.randn(VOCAB, WIDTH)
    ours.codebook.data.copy_(theirs._codebook.embed.data[0])
    mine, other = features(1), features(1)
    quantized = ours(mine)
    values, codes, _ = theirs(other)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.values, values)
    quantized.loss.mean().backward()
    # the sum that the paper has, sg[z] to e and beta times sg[e] to z, written out
    chosen = ours.codebook.detach()[quantized.codes].permute(0, 3, 1, 2)
    expected = 2 * BETA * (mine.detach() - chosen) / mine.numel()
    torch.testing.assert_close(mine.grad, expected)

"""The transformer against torch's own block, a causality probe over every token, and cached against uncached logits."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from dalle_scale.models.transformer.block import Block
from dalle_scale.models.transformer.masks import Kind, Layout, visible
from dalle_scale.models.transformer.model import Transformer, paper_order
from dalle_scale.nn.residual_scaling import cast

KINDS: tuple[Kind, ...] = get_args(Kind)
TEXT_VOCAB, TEXT_LENGTH, IMAGE_VOCAB, GRID = 11, 4, 7, 3
PROJECTIONS = ("query", "key", "value", "output")
MIXES = [*((kind,) for kind in KINDS), ("row", "column", "conv")]


def small(kinds=("row", "column", "conv"), **changes) -> Transformer:
    torch.manual_seed(0)
    sizes = {
        "text_vocab": TEXT_VOCAB,
        "text_length": TEXT_LENGTH,
        "image_vocab": IMAGE_VOCAB,
        "grid": GRID,
        "width": 16,
        "heads": 2,
        "conv_kernel": 3,
    }
    model = Transformer(**{**sizes, "kinds": kinds, **changes})
    for parameter in model.parameters():  # large enough that every path shows
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, TEXT_VOCAB, (batch, TEXT_LENGTH), generator=generator)
    text[0, -1] = TEXT_VOCAB + TEXT_LENGTH - 1  # the first caption is one token short
    return text, torch.randint(0, IMAGE_VOCAB, (batch, GRID**2), generator=generator)


def test_order_of_layers_is_the_papers():
    order = paper_order(64)
    assert order[:4] == ("row", "column", "row", "row")
    assert [order.count(kind) for kind in ("row", "column", "conv")] == [47, 16, 1]
    assert order[-1] == "conv"
    assert paper_order(1) == ("conv",)


@pytest.mark.parametrize("kind", KINDS)
def test_block_is_torchs_encoder_layer(kind):
    """Same weights, same mask: same output and same gradient of the input."""
    torch.manual_seed(0)
    layout = Layout(prefix=3, grid=GRID, conv_kernel=3)
    block = Block(16, 2, 4, kind, layout).double()
    peer = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    projections = (block.attention.query, block.attention.key, block.attention.value)
    weights = {
        "self_attn.in_proj_weight": torch.cat([projection.weight for projection in projections]),
        "self_attn.in_proj_bias": torch.cat([projection.bias for projection in projections]),
        "self_attn.out_proj.weight": block.attention.output.weight,
        "self_attn.out_proj.bias": block.attention.output.bias,
        "linear1.weight": block.expand.weight,
        "linear1.bias": block.expand.bias,
        "linear2.weight": block.contract.weight,
        "linear2.bias": block.contract.bias,
        "norm1.weight": block.attention_norm.weight,
        "norm1.bias": block.attention_norm.bias,
        "norm2.weight": block.mlp_norm.weight,
        "norm2.bias": block.mlp_norm.bias,
    }
    peer.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    x = torch.randn(2, layout.length, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs = block(x), peer(x, src_mask=~visible(kind, layout))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def changed_by(model: Transformer, text, codes, position: int) -> list[bool]:
    """Which logits move when the token at `position` of (caption, codes) is another one."""
    other_text, other_codes = text.clone(), codes.clone()
    if position < TEXT_LENGTH:
        other_text[:, position] = (text[:, position] + 1) % TEXT_VOCAB
    else:
        other_codes[:, position - TEXT_LENGTH] = (codes[:, position - TEXT_LENGTH] + 1) % IMAGE_VOCAB
    with torch.no_grad():
        before, after = model(text, codes), model(other_text, other_codes)
    moved = [(b != a).any(-1).any(0) for b, a in zip(before, after, strict=True)]
    return torch.cat(moved).tolist()


@pytest.mark.parametrize("kinds", MIXES)
def test_no_logit_sees_its_own_token_or_a_later_one(kinds):
    model, (text, codes) = small(kinds), inputs()
    for position in range(TEXT_LENGTH + GRID**2):
        assert not any(changed_by(model, text, codes, position)[: position + 1]), position


@pytest.mark.parametrize("kinds", MIXES)
def test_every_code_sees_the_whole_caption(kinds):
    model, (text, codes) = small(kinds), inputs()
    for position in range(TEXT_LENGTH):
        assert all(changed_by(model, text, codes, position)[position + 1 :]), position


def test_code_sees_what_its_kind_shows():
    """With one row layer, code k depends on the input states k-1-W ... k-1 and no others."""
    model, (text, codes) = small(("row",)), inputs()
    moved = changed_by(model, text, codes, TEXT_LENGTH + 2)[TEXT_LENGTH:]
    assert [index for index, one in enumerate(moved) if one] == [3, 4, 5, 6]


def test_text_and_image_logits_have_their_own_vocabulary():
    model, (text, codes) = small(), inputs()
    text_logits, image_logits = model(text, codes)
    assert text_logits.shape == (2, TEXT_LENGTH, TEXT_VOCAB + TEXT_LENGTH)
    assert image_logits.shape == (2, GRID**2, IMAGE_VOCAB)


@pytest.mark.parametrize("kinds", MIXES)
def test_cached_logits_are_the_uncached(kinds):
    model, (text, codes) = small(kinds).double(), inputs(batch=3)
    prefix_index = torch.tensor([2, 0, 0, 1, 2])
    codes = torch.randint(0, IMAGE_VOCAB, (5, GRID**2), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(text[prefix_index], codes)[1]
        logits, decoding = model.prefill(text, prefix_index)
        _, fixed_shapes = model.prefill(text, prefix_index)
        for index in range(GRID**2):
            torch.testing.assert_close(logits, expected[:, index])
            if index + 1 < GRID**2:
                logits = model.decode_step(codes[:, index], index, decoding)
                in_tensor = model.decode_step(
                    codes[:, index], torch.tensor([index]), fixed_shapes
                )  # as a CUDA graph has it
                torch.testing.assert_close(in_tensor, logits)


def test_decoding_in_16_bits_is_close_to_whole_sequences():
    model, (text, codes) = small(), inputs()
    cast(model, "bf16")
    with torch.inference_mode():
        expected = model(text, codes)[1]
        logits, decoding = model.prefill(text, torch.arange(2))
        for index in range(GRID**2):
            assert logits.dtype == torch.float32
            assert (logits - expected[:, index]).abs().max() < 0.03 * expected.abs().max()
            if index + 1 < GRID**2:
                logits = model.decode_step(codes[:, index], index, decoding)


def test_matrices_stored_by_columns_are_the_same_net():
    model, (text, codes) = small(), inputs()
    before, state = model(text, codes), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.store_by_columns()
    for ours, theirs in zip(model(text, codes), before, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    weight = model.blocks[0].expand.weight
    assert weight.t().is_contiguous() and not weight.is_contiguous() and model.image_head.weight.t().is_contiguous()


def test_pads_are_tokens_with_gradients_of_their_own():
    model, (text, codes) = small(), inputs()
    model(text, codes)[1].pow(2).sum().backward()
    moved = model.text_token.weight.grad.abs().sum(-1) > 0
    used = torch.zeros(TEXT_VOCAB + TEXT_LENGTH, dtype=torch.bool)
    used[text.flatten()] = True
    assert torch.equal(moved, used)
    assert moved[TEXT_VOCAB + TEXT_LENGTH - 1] and not moved[TEXT_VOCAB]


def test_activation_checkpointing_changes_nothing():
    (text, codes), gradients = inputs(), []
    for recompute in (False, True):
        model = small()
        model.activation_checkpointing = recompute
        text_logits, image_logits = model(text, codes)
        (text_logits.pow(2).sum() + image_logits.pow(2).sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_logits_are_fp32_in_a_bf16_model():
    model, (text, codes) = small().bfloat16(), inputs()
    reference = small()
    for ours, theirs in zip(model(text, codes), reference(text, codes), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.1 * theirs.abs().mean()
    with torch.inference_mode():
        assert model.prefill(text, torch.arange(2))[0].dtype == torch.float32


def test_roles_of_parameters():
    """Embeddings and unembeddings are marked; what is left with two axes is a matrix of a block."""
    model = small()
    marked = {name for name, parameter in model.named_parameters() if getattr(parameter, "is_embedding", False)}
    assert marked == {
        "start",
        "text_token.weight",
        "text_position",
        "image_code.weight",
        "image_row",
        "image_column",
        "text_head.weight",
        "image_head.weight",
    }
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2} - marked
    assert matrices == {
        f"blocks.{layer}.{part}"
        for layer in range(3)
        for part in (*(f"attention.{of}.weight" for of in PROJECTIONS), "expand.weight", "contract.weight_t")
    }


def test_fresh_weights():
    torch.manual_seed(0)
    model = Transformer(
        text_vocab=500, text_length=12, image_vocab=500, grid=4, width=64, heads=2, kinds=paper_order(8)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            onto_residual = name.endswith(("output.weight", "contract.weight_t"))
            expected = 0.02 / 4 if onto_residual else 0.02
            tolerance = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors of a standard deviation
            assert abs(parameter.std().item() / expected - 1) < tolerance, name


def test_parameters_of_the_papers_model():
    """12 * 3968^2 * 64 of the blocks, as derived from Sec. 2.2; biases, gains and positions add less than 0.1 %."""
    with torch.device("meta"):
        model = Transformer(
            text_vocab=16_384, text_length=256, image_vocab=8192, grid=32, width=3968, heads=62, kinds=paper_order(64)
        )
    matrices = 12 * 3968**2 * 64
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert matrices < blocks < 1.001 * matrices
    vocabularies = 2 * 3968 * (16_384 + 256 + 8192)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert matrices + vocabularies < total < 1.001 * (matrices + vocabularies)

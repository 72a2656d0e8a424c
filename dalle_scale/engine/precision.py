"""Choice of `engine.dtype: auto`: measured where the run starts, and kept for as long as the run lives."""

from __future__ import annotations

from dalle_scale import dist
from dalle_scale.config import RunConfig
from dalle_scale.engine import ds_config
from dalle_scale.log import say
from dalle_scale.nn import precision
from dalle_scale.types import Nets


def resolve(config: RunConfig, nets: Nets, kept: str | None = None) -> tuple[RunConfig, str]:
    """The config with a precision in the place of "auto", and what rank 0 has reported about it; "" where nothing was
    open. Collective: rank 0 measures, with as many threads as it has now.

    Args:
        nets: the stage's, which may lie on "meta".
        kept: what the run has trained in so far.

    Raises:
        UserError: the engine cannot do what was kept on this device.
    """
    if config.engine.dtype != "auto":
        return config, ""
    needing = [name for name, optim in config.optim.items() if optim.kind == "adamw16"]
    if needing and kept is None:
        dtype, note = "bf16", f"engine.dtype: auto is bf16, which optim.{needing[0]}.kind: adamw16 needs"
    else:
        choice = precision.agreed(nets.values(), dist.device())
        dtype = choice.dtype
        note = f"engine.dtype: auto is {dtype} here: {choice.why}"
        if kept is not None:
            here = f"; here it would be {dtype}: {choice.why}" if dtype != kept else ""
            dtype, note = kept, f"engine.dtype: auto stays {kept}, as the run began{here}"
    say(note)
    config = replaced(config, dtype)
    ds_config.check(config, dist.world_size(), dist.device())
    return config, note


def assumed(config: RunConfig) -> RunConfig:
    """With bf16 in the place of "auto": what GPUs of today will measure."""
    return replaced(config, "bf16") if config.engine.dtype == "auto" else config


def replaced(config: RunConfig, dtype: str) -> RunConfig:
    """The config in another precision."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": dtype})})

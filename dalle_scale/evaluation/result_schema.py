"""Result of launch/fidelity.py: numbers, and beside them everything that they depend on. A schema, JSON, Markdown.

FIDs of different protocols cannot be compared (reference split, number of images, resizing, extractor and sampler
each move them by units), so a result with a field missing is no result: `read` refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator

from dalle_scale import io
from dalle_scale.report import tables
from dalle_scale.types import StrictModel, UserError

FORMAT: Literal["dalle_scale fidelity 1"] = "dalle_scale fidelity 1"
UNKNOWN = "unknown"
# Facts about samples, from sampling.json of launch/sample.py; a missing one is "unknown".
MADE_BY = (
    "models",  # folders of the exports
    "models_sha256",  # as checkpoint.digest
    "stage",
    "weights",  # raw, or ema and its decay; of each model
    "step",  # of training, which these are; of each model
    "options",  # of sampling, each stage its own
    "prime_rows",  # rows of codes that were given
    "seed",
    "prompts",  # where they come from, how many
    "candidates",  # images a prompt
    "kept",  # all, or which ones a reranking has kept
)
RECONSTRUCTED_BY = ("model", "model_sha256")


class Extraction(StrictModel):
    """Feature extractor of a result."""

    kind: str
    source: str
    sha256: str
    layer: str
    dimensions: int
    classes: int
    resize: str


class Images(StrictModel):
    """A set of images as it went into the extractor."""

    kind: Literal["samples", "data set", "reconstructions"]
    folder: str
    split: str  # the folder's own name
    digest: str
    samples: int
    samples_lost: int  # could not be read; left out
    image_size: int
    resize: str
    order: str
    made_by: dict[str, Any]  # empty for a data set

    @model_validator(mode="after")
    def _says_what_made_it(self) -> Images:
        wanted = {"samples": MADE_BY, "reconstructions": RECONSTRUCTED_BY, "data set": ()}[self.kind]
        if missing := [name for name in wanted if name not in self.made_by]:
            raise ValueError(f"made_by: '{missing[0]}' is missing; say \"{UNKNOWN}\" where it is not known")
        return self


class Frechet(StrictModel):
    """Distance of two Gaussians: FID on the published Inception."""

    measure: Literal["frechet"] = "frechet"
    name: str
    value: float
    samples: int  # of the first set; of the second all
    reference_samples: int
    arithmetic: str


class Kernel(StrictModel):
    """Unbiased squared MMD: KID on the published Inception. value and std of the subsets."""

    measure: Literal["kernel"] = "kernel"
    name: str
    value: float
    std: float
    samples: int  # that subsets are sampled from
    reference_samples: int
    kernel: str
    subsets: int
    subset_samples: int
    seed: int


class Score(StrictModel):
    """Inception Score. value and std of the splits."""

    measure: Literal["score"] = "score"
    name: str
    value: float
    std: float
    samples: int
    splits: int
    seed: int


class Neighbours(StrictModel):
    """Precision or recall."""

    measure: Literal["precision", "recall"]
    name: str
    value: float
    samples: int
    reference_samples: int
    neighbours: int  # k


Number: TypeAlias = Annotated[Frechet | Kernel | Score | Neighbours, Field(discriminator="measure")]


class Result(StrictModel):
    """Everything that fidelity.json holds."""

    format: Literal["dalle_scale fidelity 1"]
    numbers: tuple[Number, ...]
    samples: Images
    reference: Images
    extractor: Extraction
    batch_size: int  # images at once in the extractor
    device: str
    torch: str  # its version


def write(out: Path, result: Result) -> None:
    """Write `out`/fidelity.json and fidelity.md."""
    io.write_json(out / "fidelity.json", result.model_dump())
    io.write(out / "fidelity.md", markdown(result))


def read(path: Path) -> Result:
    """Read a fidelity.json.

    Raises:
        UserError: no such file, or a field is missing, unknown or of the wrong type.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(f"{path}: not a whole result: {where}: {problem['msg']}") from None


def markdown(result: Result) -> str:
    """The numbers as a table, each with what it was computed on, and the protocol."""
    rows = [["measure", "value", "± std", "samples", "reference", "how"]]
    shown = {"measure", "name", "value", "std", "samples", "reference_samples"}
    for number in result.numbers:
        fields = number.model_dump()
        std, reference = fields.get("std"), fields.get("reference_samples")
        how = ", ".join(f"{_words(key)} {value}" for key, value in fields.items() if key not in shown)
        cells = [fields["name"], f"{fields['value']:.6g}", "–" if std is None else f"{std:.3g}"]
        cells += [f"{fields['samples']:,}", "–" if reference is None else f"{reference:,}", how]
        rows.append(cells)
    lines = ["# Fidelity of images", "", *tables.markdown(rows, text_columns=(0, 5)), ""]
    for title, part in (("samples", result.samples), ("reference", result.reference), ("extractor", result.extractor)):
        lines += [f"## {title}", "", *_told(part.model_dump()), ""]
    about = {"batch_size": result.batch_size, "device": result.device, "torch": result.torch}
    return "\n".join([*lines, "## computed with", "", *_told(about), ""])


def _told(fields: dict[str, Any], before: str = "") -> list[str]:
    """Fields as a list; those of `made_by` among them."""
    lines = []
    for key, value in fields.items():
        name = f"{before}{_words(key)}"
        lines += _told(value, f"{name} ") if isinstance(value, dict) else [f"- {name}: {value}"]
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")

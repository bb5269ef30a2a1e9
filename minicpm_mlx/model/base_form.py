"""The form of a model's weights, and what becomes of an adapter's deltas on another form.

A MiniCPM multiplies its embedding, residual branches and logits by muP's constants; a conversion to
a Llama multiplies weights by them instead. Two forms of one model compute the same, and differ by a
factor in o_proj, down_proj and the head. A delta is a change of such a matrix, so it takes the
matrix's factor; so do DoRA's magnitudes, which are lengths of its rows.

RMSNorm's eps tells the scale of the residual stream, and with it the forms apart: `mlx` carries the
stream in units of scale_emb and divides eps by its square, `llama` leaves both as they are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..arguments import number, one_of
from ..errors import InvalidArgumentError
from .config import Config
from .config_sections import FoldedMuP

FORMATS = ("mup", "llama", "mlx")

ROUNDING = 1e-6
"""Relative difference of constants that GGUF's float32 causes."""


@dataclass(frozen=True, kw_only=True)
class BaseForm:
    """Where muP's constants are in a model, and which they are; all 1 where none are known."""

    format: str
    """"mup": the model applies them; "llama" or "mlx": its weights contain them, as `convert` folds
    them in. A Llama that never had any is "llama"."""
    scale_emb: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    rms_norm_eps: float
    """As the model's config states it."""

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        for name, value in asdict(self).items():
            if name != "format" and not 0 < number(name, value) < math.inf:
                raise InvalidArgumentError(f"{name} must be above 0, got {value}")

    @classmethod
    def of(cls, config: Config) -> BaseForm:
        """The form of a model with this config."""
        if (folded := config.mup_folded) is not None:
            return cls(
                format=folded.format,
                scale_emb=folded.scale_emb,
                residual_scale=folded.scale_depth / math.sqrt(config.num_hidden_layers),
                logit_divisor=config.hidden_size / folded.dim_model_base,
                rms_norm_eps=config.rms_norm_eps,
            )
        is_llama = config.scale_depth is None and config.dim_model_base is None
        return cls(
            format="llama" if is_llama else "mup",
            scale_emb=config.scale_emb,
            residual_scale=config.residual_scale,
            logit_divisor=config.logit_divisor,
            rms_norm_eps=config.rms_norm_eps,
        )

    def __str__(self) -> str:
        if self.format == "mup":
            name = "muP form"
        elif self.has_constants:
            name = f"{self.format} form (muP folded into its weights)"
        else:
            name = "mlx form (unrecorded)" if self.was_divided else "plain llama form"
        return f"{name}, rms_norm_eps {self.rms_norm_eps:.4g}"

    @property
    def has_constants(self) -> bool:
        """Whether muP's constants are known."""
        return (self.scale_emb, self.residual_scale, self.logit_divisor) != (1.0, 1.0, 1.0)

    @property
    def was_divided(self) -> bool:
        """Whether eps is a number that nobody chooses, such as 1e-5 / 144: that of a conversion to
        mlx, even one from before they were recorded."""
        eps = self.rms_norm_eps
        return not math.isclose(eps, float(f"{eps:.2g}"), rel_tol=ROUNDING)

    @property
    def unfolded(self) -> BaseForm:
        """The muP form of this model; itself where no constants are known."""
        eps = self._unfolded_eps
        return replace(self, format="mup", rms_norm_eps=eps) if self.has_constants else self

    @property
    def _unfolded_eps(self) -> float:
        return self.rms_norm_eps * (self.scale_emb**2 if self.format == "mlx" else 1.0)

    def same_model(self, other: BaseForm) -> bool:
        """Whether both can be forms of one model, each `recognised` by the other."""
        return math.isclose(self._unfolded_eps, other._unfolded_eps, rel_tol=ROUNDING)

    def factor(self, module: str) -> float:
        """What the weights of a module are multiplied by, compared with those of the llama form."""
        if module == "lm_head":  # in mlx the last norm is divided in its place
            return 1.0 if self.format == "llama" else self.logit_divisor
        if module.endswith(("o_proj", "down_proj", ".w2")):
            return {"mup": 1 / self.residual_scale, "mlx": 1 / self.scale_emb, "llama": 1.0}[
                self.format
            ]
        return 1.0

    def recognised(self, other: BaseForm) -> BaseForm:
        """This form, with the constants of another form of its model where its config has none."""
        if self.has_constants or not other.has_constants or self.format == "mup":
            return self
        for format in ("llama", "mlx"):
            guess = replace(other, format=format, rms_norm_eps=self.rms_norm_eps)
            if guess.same_model(other):
                return guess
        return self


def config_in(config: Config, format: str) -> Config:
    """The config that the model of `config` has after a conversion to another format.

    InvalidArgumentError where muP's constants are not known.
    """
    form, folded = BaseForm.of(config), config.mup_folded
    if format == form.format:
        return config
    if not form.has_constants:
        raise InvalidArgumentError(
            f"base_format {format}: the model's config.json does not say which constants of muP "
            f"its weights contain; expected {form.format}, or the model it was converted from"
        )
    names = ("scale_emb", "scale_depth", "dim_model_base")
    constants: dict[str, Any] = {name: getattr(folded or config, name) for name in names}
    eps = form.unfolded.rms_norm_eps
    if format == "mup":
        return replace(config, **constants, rms_norm_eps=eps, mup_folded=None)
    return replace(
        config,
        scale_emb=1.0,
        scale_depth=None,
        dim_model_base=None,
        rms_norm_eps=eps / (form.scale_emb**2 if format == "mlx" else 1.0),
        mup_folded=FoldedMuP(format=format, **constants),
    )

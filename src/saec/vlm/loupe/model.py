"""Loupe: a LLaVA of real parts, a DINOv2-derived vision tower, a projector, and SmolLM2-135M.

The projector takes, besides what the tower sees, the edge's anomaly map: each visual token knows how far its square of
the part is from the station's memory of good parts. Architecture after LLaVA (Liu et al., NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers import PreTrainedModel as _PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from saec.vlm.loupe.inputs import LOUPE, LoupeSizes


class LoupeConfig(PreTrainedConfig):
    """Sizes of the parts: those of :class:`~saec.vlm.loupe.inputs.LoupeSizes`, and the projector's own."""

    model_type = "loupe"

    image_side: int = LOUPE.image_side
    patch: int = LOUPE.patch
    merge: int = LOUPE.merge
    tower_layers: tuple[int, ...] = LOUPE.tower_layers
    image_token_id: int = LOUPE.image_token
    map_mean: float = LOUPE.map_mean
    map_std: float = LOUPE.map_std
    map_hidden: int = 64
    text_config: Any = None
    vision_config: Any = None

    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=LlamaConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=Dinov2Config, model_type="dinov2"),
    }

    @property
    def sizes(self) -> LoupeSizes:
        """What the inputs depend on."""
        return LoupeSizes(
            self.image_side,
            self.patch,
            self.merge,
            tuple(self.tower_layers),
            self.image_token_id,
            self.map_mean,
            self.map_std,
        )


class Projector(nn.Module):
    """Visual tokens for the language model: GELU(W LN(x) + MLP(m, m^2)), at the scale of its word embeddings.

    ``x`` [B, T, merge^2 x layers x tower width] are the tower's patches, ``m`` [B, T, merge^2] the standardised log
    anomaly map at the same patches.
    """

    def __init__(self, width: int, cells: int, hidden: int, out: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.visual = nn.Linear(width, out)
        self.map = nn.Sequential(nn.Linear(2 * cells, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.scale = nn.Parameter(torch.tensor(scale))

    @classmethod
    def of(cls, config: LoupeConfig, scale: float) -> Projector:
        """Return an untrained projector for a configuration."""
        cells = config.merge**2
        width = cells * len(config.tower_layers) * config.vision_config.hidden_size
        return cls(width, cells, config.map_hidden, config.text_config.hidden_size, scale)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        """Return [B, T, out] in the projector's own precision."""
        x, m = x.to(self.visual.weight.dtype), m.to(self.visual.weight.dtype)
        mixed = self.visual(self.norm(x)) + self.map(torch.cat([m, m * m], dim=-1))
        return torch.as_tensor(nn.functional.gelu(mixed) * self.scale)


@dataclass
class LoupeOutput(ModelOutput):
    """``logits`` [B, n, V] of the last ``logits_to_keep`` positions."""

    logits: Tensor | None = None
    past_key_values: Any = None


class Loupe(_PreTrainedModel, GenerationMixin):
    """The whole model. Frozen but for the projector and what LoRA adds."""

    config_class = LoupeConfig
    _supports_sdpa = True
    input_modalities = ("image", "text")

    def __init__(self, config: LoupeConfig) -> None:
        super().__init__(config)
        self.vision_tower = Dinov2Model(config.vision_config)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.projector = Projector.of(config, 1.0)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.language_model.get_input_embeddings()

    def see(self, pixel_values: Tensor, anomaly_map: Tensor) -> Tensor:
        """Return the visual tokens [B, T, hidden].

        ``pixel_values`` [B, 3, side, side] normalised as ImageNet's; ``anomaly_map`` [B, patches, patches] in units of
        the station's mark level (above 1: beyond what good parts show), NaN-free, 1e-3 or more.
        """
        found = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        patches = torch.cat([self.vision_tower.layernorm(found[at])[:, 1:] for at in self.config.tower_layers], dim=-1)
        standard = (anomaly_map.clamp(min=1e-3).log() - self.config.map_mean) / self.config.map_std
        return torch.as_tensor(self.projector(self._merge(patches), self._merge(standard.flatten(1)[..., None])))

    def _merge(self, patches: Tensor) -> Tensor:
        """[B, patches, C] row by row -> [B, T, merge^2 C]: squares of patches become one token."""
        n, side, merge = len(patches), self.config.sizes.patches // self.config.merge, self.config.merge
        grid = patches.reshape(n, side, merge, side, merge, -1).transpose(2, 3)
        return grid.reshape(n, side * side, -1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        anomaly_map: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LoupeOutput:
        """Return the logits [B, n, V] of the last ``logits_to_keep`` positions; 0 keeps all of them."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and anomaly_map is not None and input_ids is not None:
            seen = self.see(pixel_values, anomaly_map).to(inputs_embeds.dtype)
            places = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, seen)
        inner = self.language_model.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden = inner.last_hidden_state
        logits = self.language_model.lm_head(hidden[:, -logits_to_keep:])
        return LoupeOutput(logits=logits, past_key_values=inner.past_key_values)

    def prepare_inputs_for_generation(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The image enters with the first step; later steps read it from the cache."""
        anomaly_map = kwargs.pop("anomaly_map", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            inputs |= {"pixel_values": pixel_values, "anomaly_map": anomaly_map}
        return inputs

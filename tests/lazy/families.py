"""The model families of transformers, small, with their heads as they are and lazy.

python tests/lazy/families.py [--markdown docs/models.md] [FAMILY ...]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from fusedloss import LazyLogits, LazyLogitsWarning, lazy_heads
from fusedloss.core import trace

CLASSES, ROWS = 97, (2, 9)
CORE = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(
        ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "num_key_value_heads": 2,
    "vocab_size": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
HEADS = {"head_dim": 8, "d_kv": 8, "rotary_dim": 4, "kv_channels": 8, "num_kv_heads": 2}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
}
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16}
NARROW = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16}
STATES = {
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "time_step_rank": 4,
    "block_size": 4,
    "num_random_blocks": 1,
}
# What a configuration is made of: the first that a model can be built from.
SIZES = (
    {**CORE, **HEADS, **EXPERTS, **LOW_RANK, **NARROW, **STATES},
    {**CORE, **EXPERTS, **LOW_RANK, **NARROW, **STATES, "num_key_value_heads": 4},
    {**CORE, **EXPERTS, **HEADS},
    {**CORE, **EXPERTS},
    CORE,
)
MOST = 12_000_000  # parameters of a model that counts as small
KINDS: dict[str, dict[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "vision and speech": {
        "llava": "LlavaForConditionalGeneration",
        "paligemma": "PaliGemmaForConditionalGeneration",
        "whisper": "WhisperForConditionalGeneration",
        "speech_to_text": "Speech2TextForConditionalGeneration",
    },
}


class CannotBuild(Exception):
    """No small model of this family can be made from a configuration alone."""


@dataclass
class Result:
    family: str
    model: str
    fused: bool
    why: str  # what computed the logits in full
    loss: float  # relative errors against the model with its own head
    gradient: float
    bytes: tuple[
        int, int
    ]  # of the vocabulary's size that autograd holds, without and with lazy heads


def build(family: str, name: str) -> tuple[Any, Callable[[], Any]]:
    """A model in float64, and what makes a step of it."""
    why: Exception | None = None
    for sizes in SIZES:
        try:
            model = _small(family, name, sizes)
            inputs = _inputs(model)
            (step := lambda model=model, inputs=inputs: _step(model, inputs))()
            return model, step
        except Exception as error:  # whatever a configuration does not allow
            why = why or error
    words = " ".join(f"{type(why).__name__}: {why}".split())
    raise CannotBuild(words[:120])


def _small(family: str, name: str, sizes: dict[str, Any]) -> Any:
    kind = configuration_auto.CONFIG_MAPPING[family]
    own = kind()
    config = kind(**{k: v for k, v in sizes.items() if hasattr(own, k)})
    config._experts_implementation = config._attn_implementation = "eager"
    config.use_cache = False
    if name.endswith(("LMHeadModel", "ForCausalLM")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    of = getattr(transformers, name)
    with torch.device("meta"):
        count = sum(p.numel() for p in of(config).parameters())
    if count > MOST:
        raise CannotBuild(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = of(config).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if model.config.is_encoder_decoder and not hasattr(model.config, "decoder_start_token_id"):
        model.config.decoder_start_token_id = 0
    return model


def _llava() -> Any:
    text = transformers.LlamaConfig(**{k: CORE[k] for k in TEXT}, head_dim=8)
    vision = transformers.CLIPVisionConfig(**IMAGES)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def _paligemma() -> Any:
    text = transformers.GemmaConfig(**{k: CORE[k] for k in TEXT}, head_dim=8)
    vision = transformers.SiglipVisionConfig(**IMAGES, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _core_of(kind: Any) -> dict[str, Any]:
    own = kind()
    return {k: v for k, v in CORE.items() if hasattr(own, k)}


def _whisper() -> Any:
    kind = transformers.WhisperConfig
    config = kind(**_core_of(kind), num_mel_bins=4, max_source_positions=6, max_target_positions=16)
    return transformers.WhisperForConditionalGeneration(config)


def _speech_to_text() -> Any:
    kind = transformers.Speech2TextConfig
    config = kind(
        **_core_of(kind), input_feat_per_channel=4, max_source_positions=12, max_target_positions=16
    )
    return transformers.Speech2TextForConditionalGeneration(config)


TEXT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
)
IMAGES = {
    **{
        k: CORE[k]
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    },
    "image_size": 4,
    "patch_size": 2,
}
IMAGE = 5  # the token in whose place a patch of the image comes
# Models that see or hear, which are made of two: what builds one, and what it takes beside tokens.
SEE: dict[str, tuple[Callable[[], Any], str, tuple[int, ...]]] = {
    "llava": (_llava, "pixel_values", (2, 3, 4, 4)),
    "paligemma": (_paligemma, "pixel_values", (2, 3, 4, 4)),
    "whisper": (_whisper, "input_features", (2, 4, 12)),
    "speech_to_text": (_speech_to_text, "input_features", (2, 12, 4)),
}


def build_seeing(family: str) -> tuple[Any, Callable[[], Any]]:
    """The same of one of `SEE`."""
    make, argument, shape = SEE[family]
    torch.manual_seed(0)
    model = make().double().train()
    generator = torch.Generator().manual_seed(2)
    inputs = {argument: torch.randn(shape, dtype=torch.float64, generator=generator)}
    tokens = torch.randint(6, CLASSES, ROWS, generator=generator)
    if argument == "pixel_values":
        tokens[:, :4] = IMAGE
        inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    labels = tokens.masked_fill(tokens == IMAGE, -100)
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    return model, lambda: _step(model, {**inputs, "labels": labels})


def _inputs(model: Any) -> dict[str, Any]:
    classes = getattr(model.config, "vocab_size", CLASSES)
    tokens = torch.randint(3, classes, ROWS, generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[0, 2:4] = -100
    return {"input_ids": tokens, "labels": labels}


def _step(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The output, and the gradients by name."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if not bool(torch.isfinite(output.loss)):
        raise CannotBuild("its loss is not finite")
    return output, grads


class _Held:
    """Adds up what autograd holds, from forward to backward, that has the vocabulary as a dimension."""

    def __init__(self, model: Any) -> None:
        self.classes = model.get_output_embeddings().weight.shape[0]
        self.parameters = {
            p.numel() for p in model.parameters()
        }  # the sizes of their gradients, too
        self.seen: set[int] = set()
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held)

    def _pack(self, tensor: Any) -> Any:
        if isinstance(tensor, LazyLogits) or tensor.numel() in self.parameters:
            return tensor
        if self.classes in tensor.shape:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in self.seen:
                self.seen.add(memory.data_ptr())
                self.bytes += memory.nbytes()
        return tensor


def compare(family: str, name: str) -> Result:
    model, step = build_seeing(family) if family in SEE else build(family, name)
    plain, lazy = _Held(model), _Held(model)
    with plain.hooks:
        expected, grads = step()
    before = trace.calls()[("lazy_head", "formula")]
    with warnings.catch_warnings(record=True) as told, lazy_heads(model, min_bytes=0):
        warnings.simplefilter("always")
        with lazy.hooks:
            found, lazy_grads = step()
    computed = trace.calls()[("lazy_head", "formula")] - before
    reasons = [str(w.message) for w in told if issubclass(w.category, LazyLogitsWarning)]
    fused = not computed and isinstance(found.logits, LazyLogits)
    assert grads.keys() == lazy_grads.keys()
    # A gradient that is 0 but for rounding has the size of its model's.
    size = max(float(g.abs().max()) for g in grads.values() if g.numel())
    worst = max(
        float((grads[n] - lazy_grads[n]).abs().max()) / (float(grads[n].abs().max()) + 1e-3 * size)
        for n in grads
        if grads[n].numel()
    )
    loss = float(abs(expected.loss - found.loss) / abs(expected.loss))
    why = "" if fused else (reasons or ["its head is no linear layer of its own"])[0]
    return Result(family, name, fused, why, loss, worst, (plain.bytes, lazy.bytes))


def families(kind: str) -> Iterator[tuple[str, str]]:
    for family, name in KINDS[kind].items():
        yield family, name if isinstance(name, str) else name[0]


HEADER = """# Models

What `fusedloss.lazy_heads` does for the model families of transformers {version}: each is built small, from
its configuration, and makes a training step with its own head and with a lazy one. "Fused" means that the loss
and all gradients came without logits, and agreed with those of the logits (rows of {rows} x {tokens} tokens,
{classes} classes, float64, though most families make their logits float32 before the loss). "Held" is what
autograd keeps from forward to backward that has the size of the vocabulary, in KiB, with the model's own head
and with a lazy one.

`python tests/lazy/families.py --markdown docs/models.md` writes this page.
"""


def page(rows: dict[str, list[Result]], lacking: dict[str, list[tuple[str, str]]]) -> str:
    words = {
        "version": transformers.__version__,
        "rows": ROWS[0],
        "tokens": ROWS[1],
        "classes": CLASSES,
    }
    parts = [HEADER.format(**words)]
    for kind, found in rows.items():
        fused = sum(r.fused for r in found)
        parts.append(
            f"\n## {kind.capitalize()} models: {fused} fused of {len(found)} that were built\n"
        )
        parts.append(
            "| family | model | logits | largest error of a gradient | held, KiB: own | lazy |"
        )
        parts.append("|---|---|---|--:|--:|--:|")
        for r in found:
            how = "fused" if r.fused else f"in full: {r.why}"
            held = " | ".join(f"{b / 1024:.1f}" for b in r.bytes)
            parts.append(f"| {r.family} | `{r.model}` | {how} | {r.gradient:.0e} | {held} |")
        if kind in lacking:
            names = ", ".join(f"{family}" for family, _ in lacking[kind])
            parts.append(
                f"\nNot built from a small configuration alone, and so not tried: {names}."
            )
    return "\n".join(parts) + "\n"


@contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="these alone")
    parser.add_argument("--markdown", help="write the page of the docs")
    args = parser.parse_args()
    rows: dict[str, list[Result]] = {}
    lacking: dict[str, list[tuple[str, str]]] = {}
    for kind in KINDS:
        for family, name in families(kind):
            if args.families and family not in args.families:
                continue
            try:
                with quiet():
                    result = compare(family, name)
                rows.setdefault(kind, []).append(result)
                print(kind, result, flush=True)
            except CannotBuild as error:
                lacking.setdefault(kind, []).append((family, str(error)))
                print(kind, family, "cannot be built:", error, flush=True)
            except Exception as error:
                rows.setdefault(kind, []).append(
                    Result(
                        family, name, False, f"FAILED {type(error).__name__}: {error}", 1, 1, (0, 0)
                    )
                )
                print(kind, family, "FAILED", type(error).__name__, error, flush=True)
    if args.markdown:
        Path(args.markdown).write_text(page(rows, lacking))
    for kind, found in rows.items():
        print(f"{kind}: {sum(r.fused for r in found)} fused of {len(found)}")
    return int(any(r.why.startswith("FAILED") for found in rows.values() for r in found))


if __name__ == "__main__":
    importlib.invalidate_caches()
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    sys.exit(main())

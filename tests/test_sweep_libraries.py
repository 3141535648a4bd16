"""Networks of transformers and timm through the whole library, where these are installed: ``nox -s integrations``."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import seeded
from sweep import run_everything
from zoo import Case, images, tokens

if not os.environ.get("PTQ_TEST_INTEGRATIONS"):
    pytest.skip("these libraries take long to import", allow_module_level=True)

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 20}


def text(kind, config, **options):
    """A network of transformers for token ids; all decoders keep their default cache."""
    cls, settings = getattr(transformers, kind), getattr(transformers, config)
    batches = [[ids] for ids in tokens()]
    return Case(lambda: cls(settings(**options)), batches, output=options.pop("output", "logits"))


def both(ids):
    return {"input_ids": ids, "decoder_input_ids": ids}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=20, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=10, pad_token_id=0,
        max_target_positions=10, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


CASES = {
    "bert": text("BertForSequenceClassification", "BertConfig", **SMALL),
    "gpt2": text("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=10),
    "llama": text("LlamaForCausalLM", "LlamaConfig", **SMALL, **HEADS),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3Config", **SMALL, **HEADS),
    "mixtral": text("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, **SMALL, **HEADS),
    "opt": text(
        "OPTForCausalLM", "OPTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        vocab_size=20, word_embed_proj_dim=16,
    ),
    "t5": Case(
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), [both(ids) for ids in tokens()],
        output="logits",
    ),
    "whisper": Case(
        whisper, [{"input_features": seeded(i, 6, 8, 20), "decoder_input_ids": ids} for i, ids in enumerate(tokens())],
        output="logits",
    ),
    "vit": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**{**SMALL, "image_size": 8, "patch_size": 4})
        ),
        images(8), output="logits",
    ),
    "timm efficientnet": Case(lambda: timm.create_model("test_efficientnet", num_classes=4), images(32)),
    "timm byobnet": Case(lambda: timm.create_model("test_byobnet", num_classes=4), images(32)),
    "timm levit": Case(
        lambda: timm.models.levit.Levit(img_size=32, embed_dim=(16, 16), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
        images(32),
    ),
    "timm vision transformer": Case(
        lambda: timm.models.VisionTransformer(32, 16, num_classes=4, embed_dim=16, depth=2, num_heads=2), images(32)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_whole_library_on(name, tmp_path):
    torch.manual_seed(0)
    run_everything(CASES[name], tmp_path)

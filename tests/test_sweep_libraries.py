"""Networks of transformers and timm through the whole library, where these are installed: ``nox -s integrations``."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torchvision
from helpers import seeded
from sweep import run_everything
from zoo import Case, images, rows, tokens

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
    return Case(lambda: cls(settings(**options)), batches, output="logits")


BART = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
WAVES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip
SEGMENTS = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 3,
}  # fmt: skip
CLIP = {
    "text_config": {**SMALL, "max_position_embeddings": 10, "eos_token_id": 19, "bos_token_id": 1, "pad_token_id": 0},
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    },
    "projection_dim": 8,
}  # fmt: skip


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {key: BART[key] for key in BART if key.startswith(("encoder_", "decoder_")) and "token" not in key}
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        num_queries=5, num_labels=3, **sizes,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


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
    "mixtral": replace(
        text("MixtralForCausalLM", "MixtralConfig", num_local_experts=3, **SMALL, **HEADS), counted=False
    ),
    "opt": text(
        "OPTForCausalLM", "OPTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        vocab_size=20, word_embed_proj_dim=16,
    ),
    "distilbert": text(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=20, dim=16, n_layers=2, n_heads=2,
        hidden_dim=32,
    ),
    "albert": text("AlbertForSequenceClassification", "AlbertConfig", embedding_size=8, **SMALL),
    "deberta": text(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"],
        **SMALL,
    ),
    "mpnet": text("MPNetForSequenceClassification", "MPNetConfig", **SMALL),
    "bart": Case(
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        [both(ids) for ids in tokens()], output="logits",
    ),
    "wav2vec2": Case(
        lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAVES)),
        [{"input_values": x} for x in rows(800, size=2)], output="logits",
    ),
    "segformer": Case(
        lambda: transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SEGMENTS)),
        [{"pixel_values": x} for x in images(32)], output="logits",
    ),
    "clip": Case(
        lambda: transformers.CLIPModel(transformers.CLIPConfig(**CLIP)),
        [{"input_ids": ids, "pixel_values": x} for ids, x in zip(tokens(), images(8), strict=True)],
        output="image_embeds",
    ),
    "detr": Case(detr, [{"pixel_values": x} for x in images(64)], output="logits"),
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
    "torchvision maxvit": Case(
        lambda: torchvision.models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=4), images(32)
    ),
    "timm efficientnet": Case(lambda: timm.create_model("test_efficientnet", num_classes=4), images(32)),
    "timm byobnet": Case(lambda: timm.create_model("test_byobnet", num_classes=4), images(32)),
    "timm levit": Case(
        lambda: timm.models.levit.Levit(img_size=32, embed_dim=(16, 16), key_dim=8, depth=(1, 1), num_heads=(2, 2)),
        images(32),
    ),
    "timm beit": Case(
        lambda: timm.models.beit.Beit(
            32, 16, num_classes=4, embed_dim=16, depth=1, num_heads=2, use_rel_pos_bias=True, use_abs_pos_emb=False
        ),
        images(32),
    ),
    "timm eva": Case(
        lambda: timm.models.eva.Eva(
            32, 16, num_classes=4, embed_dim=16, depth=1, num_heads=2, qkv_fused=False, swiglu_mlp=True,
            use_rot_pos_emb=True,
        ),
        images(32),
    ),
    "timm mobilevit": Case(lambda: timm.create_model("mobilevit_xxs", num_classes=4), images(64)),
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

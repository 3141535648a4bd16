"""Small networks of many kinds, each as a case of the sweep: module, batches, and how its step and output are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from helpers import ResNet, Transformer, seeded, token_batches
from models import Zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_ptq.calibration.forward import default_forward


@dataclass(frozen=True)
class Case:
    """One network of the sweep.

    Attributes:
        make: Returns the float module.
        batches: Calibration batches.
        forward: Calibration forward.
        output: Selects the tensor of the network's output; see OutputReader.
        dtype: Type of the module.
        covered: Least share of the multiply-accumulates that is quantized.
        counted: Whether torch's own counter has formulas for all operators.
    """

    make: Callable[[], nn.Module]
    batches: list[Any]
    forward: Callable[[nn.Module, Any], Any] = default_forward
    output: Any = None
    dtype: torch.dtype = torch.float32
    statistics: bool = True
    covered: float = 0.99
    counted: bool = True
    ignored: list[str] = field(default_factory=list)


def rows(*shape: int, count: int = 3, size: int = 6) -> list[Tensor]:
    return [seeded(i, size, *shape) for i in range(count)]


def images(side: int = 12, channels: int = 3) -> list[Tensor]:
    return rows(channels, side, side)


def tokens(length: int = 6, vocabulary: int = 20) -> list[Tensor]:
    return [torch.randint(vocabulary, (6, length), generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Functional(nn.Module):
    """A module whose forward is a function of it."""

    def __init__(self, run: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def make(run: Callable[..., Any], **children: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Return the maker of a module with these children, each made anew."""
    return lambda: Functional(run, **{name: child() for name, child in children.items()})


def linear(a: int, b: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b, **options)


def conv(a: int, b: int, size: int = 3, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(a, b, size, padding=size // 2, **options)


def several(count: int, child: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList(child() for _ in range(count))


def unet(m: Any, x: Tensor) -> Tensor:
    a = m.enter(x).relu()
    b = m.down(F.max_pool2d(a, 2)).relu()
    return m.out(torch.cat([m.up(b), a], 1))


def squeeze(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).relu()
    return m.head((y * m.gate(y.mean((2, 3))).sigmoid()[..., None, None]).mean((2, 3)))


def lstm(m: Any, ids: Tensor) -> Tensor:
    return m.head(m.rnn(m.embed(ids))[0][:, -1])


def vae(m: Any, x: Tensor) -> Tensor:
    mean, log = m.encode(x).chunk(2, -1)
    return m.decode(mean + torch.randn_like(mean) * (0.5 * log).exp())


def byol(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.teacher(x)
    return F.mse_loss(m.predict(m.student(x)), target, reduction="none").mean(-1, keepdim=True) + m.student(x)


def siamese(m: Any, pair: tuple[Tensor, Tensor]) -> Tensor:
    left, right = (m.net(x) for x in pair)
    return m.head((left - right).abs())


def tied(m: Any, ids: Tensor) -> Tensor:
    m.head.weight = m.embed.weight
    return m.head(m.body(m.embed(ids)).relu())


def mixture(m: Any, x: Tensor) -> Tensor:
    h = m.enter(x).relu()
    weight, chosen = m.router(h).softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for index, expert in enumerate(m.experts):
        mask = chosen == index
        if mask.any():
            out[mask] = expert(h[mask]) * weight[mask, None]
    return m.head(h + out)


def branch(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(m.b(h).relu() if x.mean() > 0 else h)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.head(checkpoint(lambda y: m.b(m.a(y).relu()).relu(), x, use_reentrant=False))


def in_list(m: Any, x: Tensor) -> Tensor:
    for layer in m.plain:
        x = layer(x).relu()
    return m.head(x)


def listed() -> nn.Module:
    net = Functional(in_list, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), head=nn.Linear(8, 4))
    net.plain = list(net.layers)
    return net


def several_outputs(m: Any, x: Tensor) -> dict[str, Any]:
    h = m.a(x).relu()
    return {"logits": m.b(h), "hidden": [h], "count": len(x)}


def cached(m: Any, x: Tensor) -> Tensor:
    cache: dict[int, list[Tensor]] = {}
    for layer in m.layers:
        x = layer(x, cache=cache)
    return m.head(x)


class CachedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: dict[int, list[Tensor]]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        cache.setdefault(id(self), []).append(k)
        return x + self.out(F.scaled_dot_product_attention(q, torch.cat(cache[id(self)], 1), v))


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels, self.norm = nn.Linear(6, 6), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).mT).mT
        return x + F.gelu(self.channels(self.norm(x)))


def chain(*children: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(child() for child in children))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def masked(m: Any, x: Tensor) -> Tensor:
    padding = torch.arange(x.shape[1]) >= 2 + torch.arange(len(x))[:, None] % 4
    return m.head(m.encoder(x, src_key_padding_mask=padding)[:, 0])


def compiled(net: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Functional(lambda m, x: m.net(x), net=torch.compile(net(), backend="eager"))


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4))


MLP = chain(linear(8, 16), nn.ReLU, linear(16, 4))
BY_PARTS = {"a": linear(8, 8), "b": linear(8, 8)}

PLAIN = {
    "mlp": Case(MLP, rows(8)),
    "mlp in bfloat16": Case(MLP, [x.bfloat16() for x in rows(8)], dtype=torch.bfloat16),
    "mlp in float64": Case(MLP, [x.double() for x in rows(8)], dtype=torch.float64),
    "residual network": Case(ResNet, rows(2, 6, 6)),
    "one of everything": Case(Zoo, rows(3, 8, 8)),
    "transformer": Case(Transformer, token_batches(3, 6, lengths=(5, 3))),
    "encoder with padding": Case(make(masked, encoder=encoder, head=linear(8, 4)), rows(6, 8)),
    "key-value cache": Case(make(cached, layers=several(2, CachedLayer), head=linear(8, 4)), rows(5, 8)),
    "u-net": Case(
        make(unet, enter=conv(3, 4), down=conv(4, 8), up=lambda: nn.ConvTranspose2d(8, 4, 2, 2), out=conv(8, 2, 1)),
        images(8),
        output=None,
    ),
    "depthwise": Case(chain(conv(4, 8, 1), nn.ReLU6, conv(8, 8, groups=8), nn.Flatten, linear(288, 4)), rows(4, 6, 6)),
    "squeeze and excite": Case(make(squeeze, conv=conv(3, 8), gate=linear(8, 8), head=linear(8, 4)), images(6)),
    "norm with activation": Case(
        chain(conv(3, 4), lambda: NormAct(4), conv(4, 4), lambda: NormAct(4), nn.Flatten, linear(144, 4)), images(6)
    ),
    "group norm": Case(chain(conv(3, 4), lambda: nn.GroupNorm(2, 4), nn.SiLU, nn.Flatten, linear(144, 4)), images(6)),
    "one dimension": Case(
        chain(lambda: nn.Conv1d(2, 4, 3), lambda: nn.BatchNorm1d(4), nn.ReLU, nn.Flatten, linear(32, 4)), rows(2, 10)
    ),
    "three dimensions": Case(chain(lambda: nn.Conv3d(2, 4, 3), nn.ReLU, nn.Flatten, linear(32, 4)), rows(2, 4, 4, 4)),
    "lstm": Case(
        make(lstm, embed=lambda: nn.Embedding(20, 8), rnn=lambda: nn.LSTM(8, 8, batch_first=True), head=linear(8, 4)),
        tokens(),
        counted=False,
    ),
    "variational": Case(make(vae, encode=linear(8, 16), decode=linear(8, 8)), rows(8)),
    "teacher and student": Case(make(byol, student=MLP, teacher=MLP, predict=linear(4, 4)), rows(8), output=None),
    "siamese": Case(
        make(siamese, net=MLP, head=linear(4, 4)), [[pair] for pair in zip(rows(8), rows(8)[::-1], strict=True)]
    ),
    "tied embedding": Case(
        make(tied, embed=lambda: nn.Embedding(20, 8), body=linear(8, 8), head=linear(8, 20, bias=False)), tokens()
    ),
    "mixture of experts": Case(
        make(mixture, enter=linear(8, 8), router=linear(8, 3), experts=several(3, linear(8, 8)), head=linear(8, 4)),
        rows(8, size=12),
    ),
    "branch": Case(
        make(branch, **BY_PARTS, c=linear(8, 4)), [x + shift for x, shift in zip(rows(8), (-2, 2, 2), strict=True)]
    ),
    "gradient checkpoints": Case(make(checkpointed, **BY_PARTS, head=linear(8, 4)), rows(8)),
    "layers in a list": Case(listed, rows(8)),
    "dictionary of outputs": Case(make(several_outputs, a=linear(8, 8), b=linear(8, 4)), rows(8), output="logits"),
    "transformer of torch": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), rows(5, 8), lambda net, x: net(x, x)
    ),
    "gru": Case(
        make(lstm, embed=lambda: nn.Embedding(20, 8), rnn=lambda: nn.GRU(8, 8, batch_first=True), head=linear(8, 4)),
        tokens(),
    ),
    "spectral norm": Case(
        chain(
            lambda: parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
            nn.LeakyReLU,
            nn.Flatten,
            lambda: parametrizations.spectral_norm(nn.Linear(128, 1)),
        ),
        images(6),
    ),
    "convolutions with weight norm": Case(
        chain(
            lambda: parametrizations.weight_norm(nn.Conv1d(3, 8, 3)),
            nn.ReLU,
            lambda: nn.utils.weight_norm(nn.Conv1d(8, 8, 3)),
            nn.Flatten,
            linear(48, 4),
        ),
        rows(3, 10),
    ),
    "mixer": Case(chain(Mixer, Mixer, nn.Flatten, linear(48, 4)), rows(6, 8)),
    "pixel shuffle": Case(chain(conv(3, 4), nn.ReLU, conv(4, 12), lambda: nn.PixelShuffle(2)), images(6)),
    "weight norm": Case(chain(lambda: parametrizations.weight_norm(nn.Linear(8, 8)), linear(8, 4)), rows(8)),
    "compiled": Case(compiled(MLP), rows(8)),
    "scripted part": Case(scripted, rows(8), covered=0.3),
}


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=4
    )


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=4)


def mobile() -> nn.Module:
    setting = [[1, 8, 1, 1], [4, 8, 2, 2]]
    return torchvision.models.MobileNetV2(num_classes=4, width_mult=0.5, inverted_residual_setting=setting)


def efficient() -> nn.Module:
    part = torchvision.models.efficientnet.MBConvConfig
    setting = [part(1, 3, 1, 8, 8, 1, 1.0, 1.0), part(4, 3, 2, 8, 16, 1, 1.0, 1.0)]
    return torchvision.models.EfficientNet(setting, 0.1, num_classes=4, last_channel=16)


def convnext() -> nn.Module:
    part = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([part(8, 16, 1), part(16, None, 1)], num_classes=4)


def basic_block() -> nn.Module:
    return torchvision.models.resnet.BasicBlock(8, 8)


def bottleneck() -> nn.Module:
    return torchvision.models.resnet.Bottleneck(16, 4)


def fire() -> nn.Module:
    return torchvision.models.squeezenet.Fire(8, 4, 4, 4)


def backbone() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    body.out_channels = 8
    return body


def anchors() -> nn.Module:
    return torchvision.models.detection.rpn.AnchorGenerator(((16, 32),), ((1.0,),))


def detector(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(backbone(), num_classes=3, min_size=48, max_size=64, **options)


def roi_options() -> dict[str, Any]:
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 2, 1)
    return {"rpn_anchor_generator": anchors(), "box_roi_pool": pool}


def faster_rcnn() -> nn.Module:
    head = torchvision.models.detection.faster_rcnn.TwoMLPHead(32, 16)
    predictor = torchvision.models.detection.faster_rcnn.FastRCNNPredictor(16, 3)
    options = {**roi_options(), "box_head": head, "box_predictor": predictor, "rpn_post_nms_top_n_test": 20}
    return torchvision.models.detection.FasterRCNN(backbone(), None, 48, 64, **options)


def retinanet() -> nn.Module:
    return torchvision.models.detection.RetinaNet(backbone(), 3, 48, 64, anchor_generator=anchors())


def photographs(count: int = 2) -> list[list[Tensor]]:
    return [[seeded(10 * b + i, 3, 48, 48 + 8 * i).sigmoid() for i in range(2)] for b in range(count)]


def detect(m: nn.Module, batch: list[Tensor]) -> Any:
    return m(batch)


def features(output: Any) -> Tensor:
    """The scores of the first image; detectors return a list of dictionaries."""
    return output[0]["scores"].sum().reshape(1, 1) if isinstance(output, list) else output


MODELS = torchvision.models
VISION = {
    "basic blocks": Case(chain(conv(3, 8), basic_block, basic_block, nn.Flatten, linear(288, 4)), images(6)),
    "bottleneck": Case(chain(conv(3, 16), bottleneck, nn.Flatten, linear(576, 4)), images(6)),
    "mobilenet v2": Case(mobile, images(16)),
    "efficientnet": Case(efficient, images(16)),
    "convnext": Case(convnext, images(16)),
    "shufflenet v2": Case(lambda: MODELS.ShuffleNetV2([1, 1, 1], [8, 8, 16, 32, 32], num_classes=4), images(32)),
    "densenet": Case(lambda: MODELS.DenseNet(4, (2, 2), 8, num_classes=4), images(32)),
    "fire": Case(chain(conv(3, 8), fire, nn.Flatten, linear(288, 4)), images(6)),
    "vision transformer": Case(vision_transformer, images(8)),
    "swin transformer": Case(swin, images(8)),
    "faster r-cnn": Case(faster_rcnn, photographs(), detect, features, statistics=False),
    "retinanet": Case(retinanet, photographs(), detect, features, statistics=False),
}

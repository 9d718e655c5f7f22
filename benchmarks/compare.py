"""Our parts beside transformers': equal, how fast, how much memory; and how their cost grows.

    python benchmarks/compare.py --out runs/compare
    python benchmarks/compare.py --out runs/compare --small --parts losses post-processing
    python benchmarks/compare.py growth --out runs/growth

A part and its peer have the same random weights and take turns. `parity` measures the difference in
float32, and of both in bfloat16 the difference from the peer in float32; the criterion is compared
with itself on the CPU, with the same points, and with the peer's, whose points are others. `times`
measures milliseconds and peak memory, forward and forward with backward, without recomputation; on
a GPU in bfloat16 as in training, on a CPU in float32. `compiled` does the same with the blocks of
both sides compiled. Without a word it is parity and then times; OUT/compare.md has the table.

The floor of a part is the time of its matrix products, convolutions and attention among them
(`FlopCounterMode`), at the rate that this machine has for one large product; of post-processing the
time of the operations and bytes that `postprocess.floors` counts, whichever takes longer, at that
rate and at the rate of a copy. No program reaches it: norms, sums, sampling and matching are free.

The border between decoder and losses is not the same on both sides: our decoder returns mask
embeddings, and the criterion makes masks of the matched queries; theirs makes all masks of all
layers. The row "decoders and losses" compares like with like.

`growth` times ours, forward and backward, at the toy's widths (--full: the full preset's) over
doublings of one size, and tells the exponent between them: 1 is linear. Of an image that is the
number of pixels; one exponent is 2 where every place attends to every other.
"""

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import postprocess
import torch
from measure import Report, ceilings, exponent, format_record, relative_error, time_in_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerTransformerModule,
)
from transformers.models.sam.modeling_sam import SamVisionEncoder

from xsam.cli import add_device_flag
from xsam.config import Config, xsam
from xsam.data import ResizeAndPad
from xsam.decoder import DecoderOutput
from xsam.distributed import choose_device
from xsam.llm import LanguageModel
from xsam.losses import Normalisers, Targets, segmentation_losses
from xsam.model import Segmentor, compile_blocks
from xsam.toy.preset import toy
from xsam.toy.weights import sam_config
from xsam.train import cast_parameters

NUM_IMAGES, NUM_TARGETS = 2, 20  # images of the decoders, targets of each for the losses
TOKENS_PER_NAME = 5  # of a prompt, with <p> and </p>
Output = dict[str, Tensor]  # mask and class logits under transformers' names
_LEAVES = "class_logits", "mask_embeddings", "mask_features"  # of our DecoderOutput
ROWS = "SAM encoder", "decoders", "losses", "decoders and losses"
POST = "post-processing"


def small() -> Config:
    """The toy with smaller images, and the width that transformers' decoders require."""
    sizes = dict(decoder_dim=256, decoder_heads=8, pixel_decoder_points=4, num_classes=133)
    return toy().resolve(seg_image_size=64, **sizes)


# ---- ours and theirs -----------------------------------------------------------------------------


class OurEncoder(nn.Module):
    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.encoder = segmentor.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder.neck(self.encoder(pixels)[-1])


class TheirEncoder(nn.Module):
    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.encoder = SamVisionEncoder(sam_config(segmentor.config.model))
        self.encoder.load_state_dict(segmentor.encoder.state_dict())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state


class OurDecoders(nn.Module):
    """Feature maps, finest first, to what the criterion reads."""

    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self.pixel_decoder, self.decoder = segmentor.pixel_decoder, segmentor.decoder
        self.class_head = segmentor.class_head

    def forward(self, *features: Tensor) -> DecoderOutput:
        mask_features, levels = self.pixel_decoder(list(features))
        queries, mask_embeddings = self.decoder(mask_features, levels)
        index = torch.arange(len(mask_features), device=mask_features.device)
        return DecoderOutput(self.class_head(queries), mask_embeddings, mask_features, index)


class TheirDecoders(nn.Module):
    """The same, joined as in transformers' Mask2Former: the outputs, the last one last."""

    def __init__(self, segmentor: Segmentor):
        super().__init__()
        config = mask2former_config(segmentor.config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, segmentor.connector.dims)
        self.pixel_decoder.load_state_dict(segmentor.pixel_decoder.state_dict())
        self.decoder = Mask2FormerTransformerModule(config.feature_size, config)
        self.decoder.load_state_dict(segmentor.decoder.state_dict())
        self.class_head = copy.deepcopy(segmentor.class_head)

    def forward(self, *features: Tensor) -> list[Output]:
        options = dict(output_hidden_states=True, output_attentions=False)
        pixels = self.pixel_decoder(list(features), **options)
        found = self.decoder(pixels.multi_scale_features, pixels.mask_features, **options)
        queries = torch.stack([each.transpose(0, 1) for each in found.intermediate_hidden_states])
        outputs = zip(found.masks_queries_logits, self.class_head(queries), strict=True)
        return [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in outputs]


def mask2former_config(settings: Config) -> Mask2FormerConfig:
    model, loss = settings.model, settings.loss
    return Mask2FormerConfig(
        feature_strides=[8, 16, 32],
        feature_size=model.decoder_dim,
        mask_feature_size=model.decoder_dim,
        hidden_dim=model.decoder_dim,
        num_attention_heads=model.decoder_heads,
        encoder_layers=model.pixel_decoder_layers,
        encoder_feedforward_dim=model.pixel_decoder_mlp_dim,
        decoder_layers=model.decoder_layers + 1,  # theirs counts the output before the first layer
        dim_feedforward=model.decoder_mlp_dim,
        num_queries=model.num_queries,
        num_labels=model.num_classes,
        no_object_weight=loss.background_weight,
        class_weight=loss.class_weight,
        mask_weight=loss.mask_weight,
        dice_weight=loss.dice_weight,
        train_num_points=loss.num_points,
        oversample_ratio=loss.oversample_ratio,
        importance_sample_ratio=loss.importance_ratio,
    )


class Bench:
    """The modules of both sides, in float32 at first, and their inputs."""

    def __init__(self, config: Config, device: torch.device, num_targets: int = NUM_TARGETS):
        torch.manual_seed(0)
        self.config, self.device, segmentor = config, device, Segmentor(config)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # that is timed
        with torch.no_grad():  # parameters that start at or near zero would hide a mistake
            for name, parameter in segmentor.named_parameters():
                if name.startswith("encoder.") and "norm" not in name:
                    parameter.normal_(std=0.2 if "pos" in name else 0.03)
                elif "decoder." in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        self.encoder = OurEncoder(segmentor), TheirEncoder(segmentor)
        self.decoders = OurDecoders(segmentor), TheirDecoders(segmentor)
        for module in (*self.encoder, *self.decoders):
            module.to(device)
        size, grid = config.model.seg_image_size, segmentor.encoder.pos_embed.shape[1]
        self.pixels = torch.randn(1, 3, size, size, device=device)
        self.features = [
            torch.randn(NUM_IMAGES, dim, side, side, device=device)
            for dim, side in zip(segmentor.connector.dims, (2 * grid, grid, grid // 2), strict=True)
        ]
        blocks = torch.randn(NUM_IMAGES, num_targets, 8, 8, device=device) > 0.5
        masks = blocks.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3)
        labels = torch.randint(config.model.num_classes, masks.shape[:2], device=device)
        self.targets = [Targets(*each) for each in zip(masks, labels, strict=True)]
        self.criterion = Mask2FormerLoss(mask2former_config(config), weight_dict={}).to(device)

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the modules of both sides."""
        for module in (*self.encoder, *self.decoders):
            cast_parameters(module, dtype)

    def autocast(self) -> torch.autocast:
        """As in training where bfloat16 is timed."""
        is_mixed = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed)

    def our_loss(self, predictions: DecoderOutput, place: str | None = None) -> Tensor:
        """`place`: the device on which the points are drawn (default: the modules')."""
        generators = [torch.Generator(place or self.device) for _ in range(NUM_IMAGES)]
        generators = [each.manual_seed(run) for run, each in enumerate(generators)]
        num_targets = sum(len(target.labels) for target in self.targets)
        num_queries = predictions.class_logits[-1, ..., 0].numel()  # of all runs
        weight = num_targets + self.config.loss.background_weight * (num_queries - num_targets)
        normalisers = Normalisers(num_targets, weight, 1.0)
        return sum(
            segmentation_losses(
                predictions, self.targets, generators, normalisers, self.config.loss
            ).values()
        )

    def their_loss(self, outputs: list[Output]) -> Tensor:
        # Ours casts to float32 itself; theirs raises where logits and targets differ in type.
        outputs = [{name: x.float() for name, x in each.items()} for each in outputs]
        losses = self.criterion(
            **outputs[-1],
            mask_labels=[target.masks.float() for target in self.targets],
            class_labels=[target.labels for target in self.targets],
            auxiliary_predictions=outputs[:-1],
        )
        return sum(losses.values())


# ---- parity --------------------------------------------------------------------------------------


def parity(report: Report, bench: Bench, is_chosen: Callable[[str], bool]) -> None:
    device = bench.device
    parts = {
        "SAM encoder": (bench.encoder, [bench.pixels], lambda x: x, lambda x: x),
        "decoders": (
            bench.decoders,
            bench.features,
            lambda predictions: predictions.mask_logits(),
            lambda outputs: outputs[-1]["masks_queries_logits"],
        ),
    }
    expected = {}
    for dtype in ("float32", "bfloat16"):
        is_mixed = dtype == "bfloat16"
        if is_mixed:
            bench.cast(torch.bfloat16)
        for name, (modules, inputs, *reads) in parts.items():
            if not is_chosen(name):
                continue
            with report.guard(f"{name}, {dtype}"), torch.no_grad():
                with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
                    outputs = [module(*inputs) for module in modules]
                    ours, theirs = (
                        read(output) for read, output in zip(reads, outputs, strict=True)
                    )
                if not is_mixed:
                    expected[name] = theirs
                    error = relative_error(ours, theirs)
                    # Rounding may flip a mask logit near zero, and with it an attention mask.
                    report.add(f"{name}, {dtype}", error < 1e-3, relative_error=error)
                    continue
                errors = [relative_error(each, expected[name]) for each in (ours, theirs)]
                passed = errors[0] < 1.5 * errors[1] + 1e-3
                report.add(f"{name}, {dtype}", passed, ours=errors[0], theirs=errors[1])
    if is_chosen("losses"):
        with report.guard("criterion"):
            _compare_criterion(report, bench)
    for name, calls in _readings(torch.device("cpu")).items() if is_chosen(POST) else ():
        with report.guard(f"{POST}, {name}"), torch.no_grad():
            agreement = postprocess.AGREE[name](*(call() for call in calls.values()))
            report.add(f"{POST}, {name}", agreement["equal"] > 0.97, **agreement)


def _compare_criterion(report: Report, bench: Bench) -> None:
    """Losses and gradients on the device and on the CPU, from the same predictions and points; and
    the loss beside the peer's, whose points are others."""
    bench.cast(bench.dtype)
    with torch.no_grad(), bench.autocast():
        predictions, outputs = (module(*bench.features) for module in bench.decoders)
    losses = [float(bench.our_loss(predictions)), float(bench.their_loss(outputs))]
    difference = abs(losses[0] / losses[1] - 1)
    report.add("criterion, beside the peer", difference < 0.05, relative_difference=difference)
    found, targets = [], bench.targets
    for device in (bench.device, torch.device("cpu")):
        moved = {
            name: x.to(device) for name, x in vars(predictions).items() if isinstance(x, Tensor)
        }
        leaves = [x.float().requires_grad_() for x in moved.values() if x.is_floating_point()]
        bench.targets = [Targets(t.masks.to(device), t.labels.to(device)) for t in targets]
        loss = bench.our_loss(DecoderOutput(*leaves, moved["image_index"]), place="cpu")
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    bench.targets = targets
    errors = [relative_error(*pair) for pair in zip(*found, strict=True)]
    names = "loss", "gradient_classes", "gradient_embeddings", "gradient_features"
    figures = dict(zip(names, errors, strict=True))
    report.add("criterion, beside the CPU", errors[0] < 1e-4 and max(errors) < 2e-2, **figures)


# ---- time and memory -----------------------------------------------------------------------------


Calls = dict[str, Callable[[], Tensor]]  # "ours" and "theirs", each giving a loss


def build_rows(bench: Bench, is_chosen: Callable[[str], bool]) -> dict[str, Calls]:
    """The calls of each row of ROWS that is chosen."""

    def mixed(function: Callable, *inputs: Tensor):
        with bench.autocast():
            return function(*inputs)

    def mean(outputs: Tensor | DecoderOutput | list[Output]) -> Tensor:
        if isinstance(outputs, DecoderOutput):
            outputs = [{name: getattr(outputs, name) for name in _LEAVES}]
        elif isinstance(outputs, Tensor):
            outputs = [{"": outputs}]
        return sum(x.float().mean() for each in outputs for x in each.values())

    sides = "ours", "theirs"
    rows: dict[str, Calls] = {name: {} for name in ROWS}
    for side, encoder, decoders, loss in zip(
        sides, bench.encoder, bench.decoders, (bench.our_loss, bench.their_loss), strict=True
    ):
        found = []
        if is_chosen("losses"):
            with torch.no_grad():
                found = mixed(decoders, *bench.features)
        if isinstance(found, DecoderOutput):
            leaves = {name: getattr(found, name).requires_grad_() for name in _LEAVES}
            found = dataclasses.replace(found, **leaves)
        else:
            found = [{name: x.requires_grad_() for name, x in each.items()} for each in found]
        calls = (
            lambda encoder=encoder: mean(mixed(encoder, bench.pixels)),
            lambda decoders=decoders: mean(mixed(decoders, *bench.features)),
            lambda loss=loss, found=found: loss(found),
            lambda loss=loss, decoders=decoders: loss(mixed(decoders, *bench.features)),
        )
        for name, call in zip(ROWS, calls, strict=True):
            rows[name][side] = call
    return {name: calls for name, calls in rows.items() if is_chosen(name)}


def times(
    report: Report, bench: Bench, rounds: int, backend: str | None, is_chosen: Callable[[str], bool]
) -> None:
    """`backend` of torch.compile for the blocks of both sides; None: eager."""
    bench.cast(bench.dtype)
    side = 8192 if bench.device.type == "cuda" else 1024
    limits = ceilings(bench.device, side, bench.dtype)
    report.add("ceilings", **limits)
    modules = (*bench.encoder, *bench.decoders)
    rows, suffix = build_rows(bench, is_chosen), ""
    if backend:  # compiling takes a minute or more a row
        rows = {name: rows[name] for name in (ROWS[0], ROWS[3]) if name in rows}
        suffix = ", compiled"
        for module in modules:
            compile_blocks(module, backend)

    def backward(call: Callable[[], Tensor]) -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
        call().backward()

    def add(name: str, calls: Calls, floor: float | None = None) -> None:
        with report.guard(name):
            if floor is None and not backend:
                with torch.enable_grad(), FlopCounterMode(display=False) as counter:
                    calls["ours"]()
                floor = counter.get_total_flops() / limits["product_tflops"] / 1e12
            _time_row(report, name, calls, bench.device, rounds, floor)

    for name, calls in rows.items():
        with torch.no_grad():
            add(f"{name}, forward{suffix}", calls)
        calls = {side: lambda call=call: backward(call) for side, call in calls.items()}
        add(f"{name}, forward and backward{suffix}", calls)
    if not backend and is_chosen(POST):
        class_logits, *rest = _post_outputs(torch.device("cpu"))
        needs = postprocess.floors(class_logits.softmax(-1), *rest)
        for name, calls in _readings(bench.device).items():
            num_bytes, operations = needs[name]
            floor = max(
                operations / limits["product_tflops"] / 1e12,
                num_bytes / limits["copy_gb_per_s"] / 1e9,
            )
            with torch.no_grad():
                add(f"{POST}, {name}", calls, floor)


def _post_outputs(device: torch.device) -> tuple[Tensor, Tensor, ResizeAndPad]:
    """Class logits, mask logits and transform of one image."""
    transform = ResizeAndPad.fit(postprocess.SIZE, postprocess.CANVAS)
    return *(x.to(device) for x in postprocess.model_outputs(0, transform)), transform


def _readings(device: torch.device) -> dict[str, Calls]:
    pairs = postprocess.build_pairs(*_post_outputs(device))
    return {name: dict(zip(("ours", "theirs"), pair, strict=True)) for name, pair in pairs.items()}


def _time_row(
    report: Report, name: str, calls: Calls, device: torch.device, rounds: int, floor: float | None
) -> None:
    """A record of both sides, or of ours alone where the peer raises."""
    figures: dict[str, object] = {}
    try:
        calls["theirs"]()
    except Exception as error:
        figures["peer"] = f"failed: {type(error).__name__}: {error}"[:200]
        calls = {"ours": calls["ours"]}
    timings = time_in_turns(calls, device, rounds)
    for side, timing in timings.items():
        figures |= timing.record(side)
    if len(timings) == 2:
        figures["times_faster"] = timings["theirs"].seconds / timings["ours"].seconds
        if timings["theirs"].peak:
            figures["of_peer_memory"] = timings["ours"].peak / timings["theirs"].peak
    if floor is not None:
        figures["floor_share"] = floor / timings["ours"].seconds
    report.add(name, **figures)


def table(records: list[dict]) -> str:
    """The rows that were timed, and what was checked."""
    columns = {
        "ours, ms": "ours_ms",
        "peer, ms": "theirs_ms",
        "times faster": "times_faster",
        "ours, MB": "ours_peak_gb",
        "peer, MB": "theirs_peak_gb",
        "of the peer's memory": "of_peer_memory",
        "floor by ours": "floor_share",
    }
    if not any("theirs_ms" in record for record in records):  # growth
        columns = {"ms": "ours_ms", "MB": "ours_peak_gb"}
        columns |= {f"exponent of {what}": f"{key}_exponent" for what, key in columns.items()}
    lines = ["| part | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for record in records:
        if "ours_ms" in record:
            figures = record | {k: x * 1e3 for k, x in record.items() if k.endswith("_gb")}
            cells = [figures.get(key) for key in columns.values()]
            cells = ["–" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in cells]
            lines.append(f"| {record['name']} | {' | '.join(cells)} |")
    checks = [f"- {format_record(record).strip()}" for record in records if "passed" in record]
    return "\n".join([*lines, "", *checks])


# ---- growth --------------------------------------------------------------------------------------


def growth_series(is_full: bool, device: torch.device) -> dict[str, tuple]:
    """Of each series its sizes, and what builds the call of one of them; the call gives what is to
    be differentiated. Of `runs` and `names` an image is one, and the language model has two layers
    and no image tokens."""
    config = xsam() if is_full else small()
    sides = [256, 512, 1024] if is_full else [64, 128, 256]

    def bench(side: int = sides[1], num_targets: int = 1, **changes) -> Bench:
        return Bench(config.resolve(seg_image_size=side, **changes), device, num_targets)

    def encoder(num_pixels: int) -> Callable[[], Tensor]:
        part = bench(round(num_pixels**0.5))
        return lambda: part.encoder[0](part.pixels).mean()

    def decoders(num_pixels: int) -> Callable[[], Tensor]:
        part = bench(round(num_pixels**0.5))
        return lambda: _sum(part.decoders[0](*part.features))

    def runs(count: int) -> Callable[[], Tensor]:
        part, index = bench(), torch.zeros(count, dtype=torch.long, device=device)
        features = [each[:1] for each in part.features]

        def call() -> Tensor:
            ours = part.decoders[0]
            mask_features, levels = ours.pixel_decoder(features)
            levels = [level[index] for level in levels]
            queries, embeddings = ours.decoder(mask_features[index], levels)
            return ours.class_head(queries).mean() + embeddings.mean()

        return call

    def losses(count: int) -> Callable[[], Tensor]:
        part = bench(num_targets=count, num_queries=200)
        with torch.no_grad():
            found = part.decoders[0](*part.features)
        leaves = {name: getattr(found, name).requires_grad_() for name in _LEAVES}
        return lambda: part.our_loss(dataclasses.replace(found, **leaves))

    def names(count: int) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = LanguageModel(config.model.llm_config | {"num_hidden_layers": 2}).to(device)
        x = torch.randn(1, TOKENS_PER_NAME * count, model.dim, device=device)
        return lambda: model(x, torch.ones(x.shape[:2], dtype=torch.long, device=device)).mean()

    pixels = [side**2 for side in sides]
    return {
        "SAM encoder, pixels": (pixels, encoder),
        "decoders, pixels": (pixels, decoders),
        "decoders, phrases of an image": ([1, 2, 4, 8], runs),
        "losses, targets of an image": ([12, 25, 50, 100], losses),
        "language model, names of a prompt": ([12, 25, 50, 100], names),
    }


def growth(
    report: Report,
    device: torch.device,
    rounds: int,
    is_full: bool,
    is_chosen: Callable[[str], bool],
) -> None:
    for name, (sizes, build) in growth_series(is_full, device).items():
        if not is_chosen(name):
            continue
        with report.guard(name):
            built = {size: build(size) for size in sizes}
            calls = {n: lambda call=call: call().backward() for n, call in built.items()}
            timings = time_in_turns(calls, device, rounds)
            for old, size in zip([None, *sizes], sizes, strict=False):
                figures = timings[size].record("ours")
                for figure in list(figures) if old else ():
                    costs = timings[old].record("ours")[figure], figures[figure]
                    if all(costs):
                        figures[f"{figure}_exponent"] = exponent((old, size), costs)
                report.add(f"{name}: {size}", **figures)


def _sum(output: DecoderOutput) -> Tensor:
    return sum(getattr(output, name).mean() for name in _LEAVES)


# ---- command line --------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = "compare", "parity", "times", "compiled", "growth"
    parser.add_argument(
        "what", nargs="?", choices=commands, default="compare", help="what to measure"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for WHAT.jsonl and .md")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="at the toy's sizes")
    size.add_argument("--full", action="store_true", help="growth at the full preset's widths")
    text = "these alone: rows whose name begins with a PART"
    parser.add_argument("--parts", nargs="+", metavar="PART", help=text)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument(
        "--backend", default="inductor", help="of compiled: torch.compile's (default: inductor)"
    )
    add_device_flag(parser)
    options = parser.parse_args()
    report, device = Report(options.out / f"{options.what}.jsonl"), choose_device(options.device)

    def is_chosen(name: str) -> bool:
        return not options.parts or name.startswith(tuple(options.parts))

    if options.what == "growth":
        growth(report, device, options.rounds, options.full, is_chosen)
    else:
        is_small = options.small or not any(map(is_chosen, ROWS))  # no module is asked for
        config = small() if is_small else xsam()
        if not is_chosen(ROWS[0]):  # what is not asked for is not made
            config = config.resolve(seg_depth=1, seg_global_blocks=())
        bench = Bench(config, device)
        if options.what in ("compare", "parity"):
            parity(report, bench, is_chosen)
        if options.what != "parity":
            backend = options.backend if options.what == "compiled" else None
            times(report, bench, options.rounds, backend, is_chosen)
    text = table(report.records)
    (options.out / f"{options.what}.md").write_text(text + "\n", encoding="utf-8")
    (options.out / f"{options.what}.json").write_text(json.dumps(report.records, indent=1))
    print(f"\n{text}")
    return int(report.num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""X-SAM: the parts joined, for training (`forward`) and inference (`infer`).

The whole diagram (paper section 3.2, figure 3). `Segmentor` alone is the model of stage 1; `XSAM`
adds the image encoder and the language model, whose condition and <SEG> states say what the
segmentor has to segment.
Legend: B images of a batch, D reference images, h w patch grid, N positions of a text, V visual
tokens of an image, R decoder runs, P phrases of a batch, K classes of a run, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from xsam import former_names
from xsam.config import Config, ModelConfig
from xsam.connector import (
    ConvBranch,
    Projector,
    SegmentationConnector,
    pixel_shuffle,
    sample_regions,
)
from xsam.decoder import (
    CosineClassHead,
    DecoderLayer,
    DecoderOutput,
    LinearClassHead,
    MaskedAttentionDecoder,
    PixelDecoder,
    PixelDecoderLayer,
)
from xsam.encoders import Block, ImageEncoder, SamEncoder
from xsam.llm import LanguageModel, Runs, find_runs, without_marks
from xsam.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from xsam.data import Batch
    from xsam.images import Picture
    from xsam.inference import EncodedImage
    from xsam.results import SegmentationResult
    from xsam.variants import SwinEncoder


@dataclass
class Outputs:
    """What a forward pass gives to the losses."""

    predictions: DecoderOutput | None  # None where nothing is segmented
    token_loss: Tensor | None  # scalar, summed over the labelled tokens; None in stage 1


@dataclass
class ImageFeatures:
    """What the encoders make of images, kept for more than one request on them."""

    hidden_states: list[Tensor]  # of the segmentation encoder, all [B, h, w, C]
    image_tokens: Tensor | None  # [B, tokens, C], projected; None without an image encoder


def build_seg_encoder(config: ModelConfig) -> SamEncoder | SwinEncoder:
    """The segmentation encoder that a configuration asks for. Raises ValueError where its numbers
    are not those of the backbone."""
    if not config.seg_backbone_config:
        return SamEncoder(
            image_size=config.seg_image_size,
            patch_size=config.seg_patch_size,
            dim=config.seg_dim,
            depth=config.seg_depth,
            num_heads=config.seg_heads,
            mlp_dim=config.seg_mlp_dim,
            window_size=config.seg_window_size,
            global_blocks=config.seg_global_blocks,
            neck_dim=config.seg_neck_dim,
        )
    from xsam.variants import SwinEncoder

    encoder = SwinEncoder(config.seg_backbone_config)
    if (config.seg_patch_size, config.seg_dim) != (encoder.stride, encoder.dims[-2]):
        raise ValueError(
            f"the backbone's last scale but one has stride {encoder.stride} and width "
            f"{encoder.dims[-2]}: seg_patch_size and seg_dim must say so"
        )
    return encoder


class Segmentor(nn.Module):
    """Segmentation encoder, connector, segmentation decoder and class head."""

    stage, prefix = 1, "segmentor."  # of its checkpoints, and of its parameters' names in them
    tokenizer = None  # this model reads no text

    def __init__(self, config: Config, class_head: nn.Module | None = None):
        """`class_head` None: the linear head of stage 1. Raises ValueError where the decoder does
        not fit the encoder."""
        super().__init__()
        self.config, model_config = config, config.model
        self.encoder = build_seg_encoder(model_config)
        self.connector = self.pixel_decoder = None
        decoder_sizes = dict(
            dim=model_config.decoder_dim,
            num_layers=model_config.decoder_layers,
            num_heads=model_config.decoder_heads,
            mlp_dim=model_config.decoder_mlp_dim,
            num_queries=model_config.num_queries,
        )
        if model_config.decoder == "sam":
            if (
                model_config.seg_backbone_config
                or model_config.seg_neck_dim != model_config.decoder_dim
            ):
                raise ValueError(
                    "decoder sam reads the neck of SAM's encoder: it wants a SAM seg_encoder and "
                    "decoder_dim equal to seg_neck_dim"
                )
            from xsam.variants import SamMaskDecoder

            self.decoder = SamMaskDecoder(**decoder_sizes)
        else:
            if not model_config.seg_backbone_config:
                self.connector = SegmentationConnector(
                    model_config.connector,
                    model_config.seg_dim,
                    model_config.connector_dim,
                    model_config.connector_scales,
                    model_config.connector_layers,
                )
            self.pixel_decoder = PixelDecoder(
                in_dims=(self.connector or self.encoder).dims,
                dim=model_config.decoder_dim,
                num_layers=model_config.pixel_decoder_layers,
                num_heads=model_config.decoder_heads,
                num_points=model_config.pixel_decoder_points,
                mlp_dim=model_config.pixel_decoder_mlp_dim,
            )
            num_levels = self.pixel_decoder.num_levels
            self.decoder = MaskedAttentionDecoder(**decoder_sizes, num_levels=num_levels)
        self.class_head = class_head or LinearClassHead(
            model_config.decoder_dim, model_config.num_classes
        )

    def decode(
        self,
        hidden_states: list[Tensor],
        image_index: Tensor,
        seg_embeddings: Tensor | None,
        *classes: Tensor,
    ) -> DecoderOutput:
        """Masks and class logits of R runs, from the encoder's hidden states [B, h, w, C],
        image_index [R], int64, the image of a run, and seg_embeddings [R, C] or None. `classes`
        goes to the class head: nothing to the linear one, condition embeddings [R, K+1, C] and
        is_padding [R, K+1] to the cosine one. The pixel decoder runs once for an image, however
        many runs read its features."""
        feature_index = None
        if self.pixel_decoder is None:
            neck = self.encoder.neck(hidden_states[-1])[image_index]  # [R, C, h, w]
            queries, mask_embeddings, mask_features = self.decoder(neck, seg_embeddings)
            feature_index = torch.arange(len(image_index), device=image_index.device)
        else:
            if self.connector is not None:
                scales = self.connector(hidden_states)
            else:
                scales = [x.permute(0, 3, 1, 2) for x in hidden_states[: len(self.encoder.dims)]]
            mask_features, levels = self.pixel_decoder(scales)
            levels = [level[image_index] for level in levels]  # [B, C, h_i, w_i] to [R, …]
            queries, mask_embeddings = self.decoder(
                mask_features[image_index], levels, seg_embeddings
            )
        class_logits = self.class_head(queries, *classes)
        return DecoderOutput(
            class_logits, mask_embeddings, mask_features, image_index, feature_index
        )

    def forward(self, batch: Batch) -> Outputs:
        """Stage 1: a run for every image, the classes of the linear head."""
        hidden_states = self.encoder(batch.seg_pixels)
        image_index = torch.arange(len(batch.seg_pixels), device=batch.seg_pixels.device)
        return Outputs(self.decode(hidden_states, image_index, None), None)

    def encode_images(self, batch: Batch) -> ImageFeatures:
        """The features of the images of a batch; there are no image tokens."""
        return ImageFeatures(self.encoder(batch.seg_pixels), None)

    @torch.no_grad()
    def infer(
        self, batch: Batch, max_new_tokens: int = 0, features: ImageFeatures | None = None
    ) -> tuple[list[str], DecoderOutput]:
        """Answers, here empty, and predictions, as `XSAM.infer` gives them."""
        hidden_states = (features or self.encode_images(batch)).hidden_states
        image_index = torch.arange(len(batch.seg_pixels), device=batch.seg_pixels.device)
        return [""] * len(image_index), self.decode(hidden_states, image_index, None)


def number_images(pixels: Tensor) -> Tensor:
    """Numbers [B] of images [B, 3, S, S], from 0 on: equal images in a row have the same one."""
    is_new = (pixels[1:] != pixels[:-1]).flatten(1).any(dim=1)
    return F.pad(is_new.cumsum(0), (1, 0))


class XSAM(nn.Module):
    """One multimodal model for every segmentation task and for chat."""

    stage, prefix = 3, ""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_encoder: ImageEncoder | None = None,
        llm: LanguageModel | None = None,
    ):
        """`tokenizer` gains the special tokens; without one the model can be built and loaded, but
        not run until `set_tokenizer`. `image_encoder` and `llm` are used where they are given, and
        made with random weights where not. Raises ValueError where the language model would be
        shown no image."""
        super().__init__()
        self.config, model_config = config, config.model
        self.segmentor = Segmentor(config, CosineClassHead(model_config.logit_clamp))
        self.image_encoder = self.image_projector = None
        self.llm = llm or LanguageModel(model_config.llm_config)
        if model_config.image_encoder != "none":
            self.image_encoder = image_encoder or ImageEncoder(model_config.image_encoder_config)
            self.image_projector = Projector(self.image_encoder.dim, self.llm.dim)
        elif not model_config.seg_tokens:
            raise ValueError("seg_tokens false: the language model needs an image_encoder then")
        self.seg_projector = None
        if model_config.seg_tokens:
            self.seg_projector = Projector(4 * model_config.seg_dim, self.llm.dim)
        self.llm_projector = Projector(self.llm.dim, model_config.decoder_dim)
        self.background_embedding = nn.Embedding(1, model_config.decoder_dim)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the tokenizer, which gains the special tokens, and grows the embeddings to its
        vocabulary, whose size the configuration has from then on."""
        self.tokenizer = tokenizer
        rows = self.llm.set_tokenizer(tokenizer)
        llm_config = self.config.model.llm_config | {"vocab_size": rows}
        self.config = self.config.resolve(llm_config=llm_config)

    def encode_images(self, batch: Batch, chosen: slice | Tensor = slice(None)) -> ImageFeatures:
        """The features of the images of a batch, or of those `chosen` by a mask, bool [B]."""
        B, image_tokens = len(batch.input_ids), None
        hidden_states = self.segmentor.encoder(batch.seg_pixels[:B][chosen])
        if self.image_encoder is not None:
            image_tokens = self.encode_tokens(batch.image_pixels[:B][chosen])
        return ImageFeatures(hidden_states, image_tokens)

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """[B, 3, s, s] pixels of the image encoder to its projected tokens [B, tokens, C]."""
        return self.image_projector(self.image_encoder(pixels))

    def encode(
        self,
        batch: Batch,
        image_index: Tensor | None = None,
        features: ImageFeatures | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings [B, N, C] of the batch's words, visual tokens and regions, and the hidden
        states [B, h, w, C] of the segmentation encoder.

        Image tokens come before segmentation tokens. Regions are read from the segmentation tokens,
        or where the language model is shown none, from the image tokens; the D reference images
        pass through that encoder alone. With an `image_index` [B] (`number_images`) only the
        different images among the B are encoded, and the hidden states are of these. `features` are
        of these images too, which are then not encoded again.
        """
        B, model_config = len(batch.input_ids), self.config.model
        is_new = index = slice(None)  # all images; or the first of equal ones, and back to all
        if image_index is not None:
            is_new, index = F.pad(image_index.diff() > 0, (1, 0), value=True), image_index
        features = features or self.encode_images(batch, is_new)
        visual_tokens = []
        if features.image_tokens is not None:
            visual_tokens.append(features.image_tokens[index])
        if self.seg_projector is not None:
            _, *references = batch.seg_pixels.split(B)
            shown = [self.segmentor.encoder(pixels)[-2] for pixels in references]
            shown = torch.cat([features.hidden_states[-2][index], *shown])  # [B + D, h, w, C]
            grid = self.seg_projector(pixel_shuffle(shown, 0.5))  # [B + D, h/2, w/2, C]
            visual_tokens.append(grid[:B].flatten(1, 2))
        else:
            _, *references = batch.image_pixels.split(B)
            tokens = torch.cat([*visual_tokens, *map(self.encode_tokens, references)])
            side = math.isqrt(tokens.shape[1])
            grid = tokens.unflatten(1, (side, side))  # [B + D, side, side, C]
        visual_tokens = torch.cat(visual_tokens, dim=1)  # [B, V, C]
        is_shown = [not sample.is_text for sample in batch.samples]
        if not all(is_shown):  # the text of the others has no places for them
            visual_tokens = visual_tokens[is_shown]
        regions = sample_regions(
            grid,
            batch.region_points,
            batch.region_index,
            model_config.region_pooling,
            model_config.num_region_vectors,
        )
        return self.llm.embed(batch.input_ids, visual_tokens, regions), features.hidden_states

    def forward(self, batch: Batch) -> Outputs:
        """Stages 2 and 3: the loss of the answers' tokens, and for a task that segments the masks
        and class logits of the batch's runs."""
        embeddings, hidden_states = self.encode(batch)
        states = self.llm(embeddings, batch.attention_mask)
        token_loss = self.llm.token_loss(states, batch.labels)
        if not batch.has_masks:
            return Outputs(None, token_loss)
        predictions = self.segment(hidden_states, states, batch.runs)
        if predictions is None and self.training:
            # Nothing that is asked for is there. The segmentor gets a gradient of zero, so that
            # this rank has gradients of the same parameters as those where something is.
            idle = (self.segmentor, self.llm_projector, self.background_embedding)
            parameters = [p for part in idle for p in part.parameters() if p.requires_grad]
            token_loss = token_loss + 0 * sum(parameter.sum() for parameter in parameters)
        return Outputs(predictions, token_loss)

    def segment(
        self,
        hidden_states: list[Tensor],
        states: Tensor,
        runs: Runs,
        image_index: Tensor | None = None,
    ) -> DecoderOutput | None:
        """Masks and class logits of `runs`, from the segmentation encoder's hidden states and the
        language model's last hidden states [B, N, C]; None where there are no runs. `image_index`
        as in `encode`."""
        if len(runs.image_index) == 0:
            return None
        condition_embeddings, is_padding = self.gather_condition_embeddings(states, runs)
        seg_embeddings = self.llm_projector(states[runs.image_index, runs.seg_position])
        index = runs.image_index if image_index is None else image_index[runs.image_index]
        output = self.segmentor.decode(
            hidden_states, index, seg_embeddings, condition_embeddings, is_padding
        )
        if image_index is not None:
            output.feature_index = index if output.feature_index is None else output.feature_index
            output.image_index = runs.image_index
        return output

    def gather_condition_embeddings(self, states: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
        """The embeddings of the classes of every run, the background last, [R, K+1, C], and which
        of them are padding, bool [R, K+1]. A class is the mean of the projected states of its
        phrase's tokens, <p> and </p> included (paper section 3.1, "Unified Formulation")."""
        inside = runs.phrase_number >= 0
        projected = self.llm_projector(states[inside])  # [tokens in phrases, C]
        index = runs.phrase_number[inside]
        sums = projected.new_zeros(runs.num_phrases, projected.shape[-1])
        sums = sums.index_add(0, index, projected)
        phrases = sums / index.bincount(minlength=runs.num_phrases)[:, None]  # [P, C]
        background = self.background_embedding.weight.expand(len(runs.classes), 1, -1)
        embeddings = torch.cat([phrases[runs.classes.clamp(min=0)], background], dim=1)
        return embeddings, F.pad(runs.classes < 0, (0, 1))

    @torch.no_grad()
    def infer(
        self,
        batch: Batch,
        max_new_tokens: int,
        features: ImageFeatures | None = None,
        on_answers: Callable[[list[str]], None] | None = None,
    ) -> tuple[list[str], DecoderOutput | None]:
        """Greedy answers to a left-padded batch of open questions, and what their <SEG> tokens
        segment: None for chat, and where no answer has one. An image in several rows, one after
        the other, is encoded once; `features` are of the different images. `on_answers` is called
        with the answers so far after every token."""
        image_index = number_images(batch.seg_pixels[: len(batch.input_ids)])
        embeddings, hidden_states = self.encode(batch, image_index, features)
        decode = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)

        def read(ids: Tensor) -> list[str]:
            return [decode(row[row >= 0]).strip() for row in ids]

        new_ids, states, new_states = self.llm.generate(
            embeddings,
            batch.attention_mask,
            max_new_tokens,
            on_ids=on_answers and (lambda ids: on_answers(read(ids))),
        )
        answers = read(new_ids)
        if not batch.has_masks:
            return answers, None
        # The classes are the question's phrases, or where it has none (GCG) those of the answer.
        if not TASKS[batch.task].is_grounded:
            new_ids = without_marks(new_ids, self.llm.special_ids)
        input_ids = torch.cat([batch.input_ids, new_ids], dim=1)
        runs = find_runs(input_ids, self.llm.special_ids, TASKS[batch.task].is_per_phrase)
        states = torch.cat([states, new_states], dim=1)
        return answers, self.segment(hidden_states, states, runs, image_index)

    def predict(
        self, image: Picture | list[Picture], task: str, text: str | list[str] = "", **options
    ) -> SegmentationResult | list[SegmentationResult]:
        """See `inference.predict`."""
        from xsam.inference import predict

        return predict(self, image, task, text, **options)

    def encode_image(self, image: Picture | Path | str) -> EncodedImage:
        """See `inference.encode_image`."""
        from xsam.inference import encode_image

        return encode_image(self, image)

    @classmethod
    def from_pretrained(cls, path: Path | str, **options) -> XSAM:
        """The whole model of a checkpoint, ours or a published one: see
        `inference.load_checkpoint`."""
        from xsam.inference import load_checkpoint

        model, _ = load_checkpoint(path, **options)
        if not isinstance(model, cls):
            raise ValueError(
                f"{path}: the segmentor of stage 1 alone; see xsam.inference.load_checkpoint"
            )
        return model

    def save_pretrained(self, folder: Path | str, **options) -> None:
        """Writes a folder that `from_pretrained` reads: see `inference.save_pretrained`."""
        from xsam.inference import save_pretrained

        save_pretrained(self, Path(folder), **options)

    def push_to_hub(self, name: str, **options) -> str:
        """Uploads the model to OWNER/NAME of the Hugging Face hub: see `export.push_to_hub`."""
        from xsam.export import push_to_hub

        return push_to_hub(self, name, **options)


__getattr__ = former_names(load_checkpoint="xsam.inference", save_pretrained="xsam.inference")

# The layers that the parts repeat; the last is the base of those of transformers.
BLOCKS = Block, ConvBranch, PixelDecoderLayer, DecoderLayer, GradientCheckpointingLayer


def is_block(module: nn.Module) -> bool:
    """Whether a module is one of the layers that a part repeats; variants.py marks its own."""
    return isinstance(module, BLOCKS) or getattr(module, "is_block", False)


def checkpoint_activations(model: nn.Module) -> None:
    """Makes every block keep its input alone for the backward pass, and run again there (Chen et
    al. 2016): the same gradients for a third more work."""
    for module in filter(is_block, model.modules()):
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Makes every block run as torch.compile compiles it; blocks of one kind share their code. To
    be called before `checkpoint_activations`, which then repeats the compiled block."""
    for module in filter(is_block, model.modules()):
        module.forward = torch.compile(module.forward, backend=backend)

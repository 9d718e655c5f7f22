"""X-SAM: the parts joined, trained by `forward`, asked by `infer`, and read out as masks.

The whole diagram (paper section 3, figure 2). `Segmentor` alone is the model of stage 1; `XSAM` adds
the image encoder and the language model, whose condition and <SEG> states steer the segmentor.
Legend: B images, R decoder runs, P phrases, Q queries, K classes, C channels, V visual tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from xsam.config import ModelConfig
from xsam.connector import Projector, SegmentationConnector, pixel_shuffle
from xsam.data import Batch
from xsam.decoder import (
    CosineClassHead,
    LinearClassHead,
    MaskedAttentionDecoder,
    PixelDecoder,
    Predictions,
)
from xsam.encoders import ImageEncoder, Placement, SamEncoder
from xsam.llm import LanguageModel


@dataclass
class Outputs:
    """What a forward pass leaves for the losses."""

    predictions: Predictions | None  # None where nothing is segmented
    token_loss: Tensor | None  # summed over the labelled tokens; None in stage 1


class Segmentor(nn.Module):
    """Segmentation encoder, connector, pixel decoder, masked-attention decoder and class head."""

    def __init__(self, config: ModelConfig, class_head: nn.Module | None = None):
        """`class_head` None: the linear head of stage 1."""
        super().__init__()
        self.encoder = SamEncoder(
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
        self.connector = SegmentationConnector(
            config.seg_dim, config.connector_dim, config.connector_scales, config.connector_layers
        )
        self.pixel_decoder = PixelDecoder(
            in_dims=self.connector.out_dims,
            dim=config.decoder_dim,
            num_layers=config.pixel_decoder_layers,
            num_heads=config.decoder_heads,
            num_points=config.pixel_decoder_points,
            mlp_dim=config.pixel_decoder_mlp_dim,
        )
        self.decoder = MaskedAttentionDecoder(
            dim=config.decoder_dim,
            num_layers=config.decoder_layers,
            num_heads=config.decoder_heads,
            mlp_dim=config.decoder_mlp_dim,
            num_queries=config.num_queries,
            num_levels=len(config.connector_scales),
        )
        self.class_head = class_head or LinearClassHead(config.decoder_dim, config.num_classes)

    def decode(
        self, hidden_states: list[Tensor], image_index: Tensor, seg_embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and mask embeddings [L, R, Q, C] of each run, and mask features [B, C, h, w].

        An image is decoded to features once, however many runs (image_index [R]) read them.
        """
        mask_features, levels = self.pixel_decoder(self.connector(hidden_states))
        queries, mask_embeddings = self.decoder(
            mask_features[image_index], [level[image_index] for level in levels], seg_embeddings
        )
        return queries, mask_embeddings, mask_features

    def forward(self, batch: Batch) -> Outputs:
        """Stage 1: one run for each image, classes of the linear head."""
        hidden_states = self.encoder(batch.seg_pixels)
        image_index = torch.arange(len(batch.seg_pixels), device=batch.seg_pixels.device)
        queries, mask_embeddings, features = self.decode(hidden_states, image_index, None)
        class_logits = self.class_head(queries)
        return Outputs(Predictions(class_logits, mask_embeddings, features, image_index), None)

    @torch.no_grad()
    def infer(self, batch: Batch, max_new_tokens: int = 0) -> tuple[list[str], Predictions]:
        """Answers (none here) and predictions, as `XSAM.infer` gives them."""
        return [""] * len(batch.seg_pixels), self(batch).predictions


class XSAM(nn.Module):
    """One multimodal model for every segmentation task and for chat."""

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None):
        """`tokenizer` gains the special tokens; without one the model can be built and loaded, but
        not run (`set_tokenizer`)."""
        super().__init__()
        self.segmentor = Segmentor(config, CosineClassHead(config.logit_clamp))
        self.image_encoder = ImageEncoder(config.image_encoder_config)
        self.llm = LanguageModel(config.llm_config)
        self.image_projector = Projector(self.image_encoder.dim, self.llm.dim)
        self.seg_projector = Projector(4 * config.seg_dim, self.llm.dim)
        self.llm_projector = Projector(self.llm.dim, config.decoder_dim)
        self.background_embedding = nn.Embedding(1, config.decoder_dim)
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.llm.set_tokenizer(tokenizer)

    def visual_tokens(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, V, C] for the language model, those of the image encoder first, and the
        segmentation encoder's hidden states."""
        hidden_states = self.segmentor.encoder(batch.seg_pixels)
        seg_tokens = self.seg_projector(pixel_shuffle(hidden_states[-2], 0.5)).flatten(1, 2)
        image_tokens = self.image_projector(self.image_encoder(batch.image_pixels))
        return torch.cat([image_tokens, seg_tokens], dim=1), hidden_states

    def forward(self, batch: Batch) -> Outputs:
        visual_tokens, hidden_states = self.visual_tokens(batch)
        embeddings = self.llm.embed(batch.input_ids, visual_tokens)
        states = self.llm(embeddings, batch.attention_mask)
        token_loss = self.llm.token_loss(states, batch.labels)
        if batch.task == "chat":
            return Outputs(None, token_loss)
        predictions = self.segment(batch.task, hidden_states, states, batch.input_ids)
        return Outputs(predictions, token_loss)

    def segment(
        self, task: str, hidden_states: list[Tensor], states: Tensor, input_ids: Tensor
    ) -> Predictions | None:
        """Runs the segmentor once for each <SEG> among input_ids [B, N]; None where there is none.

        Generic tasks have one run an image, whose classes are the image's phrases. Referring pairs
        the n-th <SEG> of an image with its n-th phrase; in training the phrases of the whole batch
        are the classes, so that the others are negatives, at inference the phrase stands alone and
        no answer depends on the batch.
        """
        is_per_phrase = task == "refer"
        number = self.llm.phrase_numbers(input_ids)
        phrases = self._phrase_means(states, number)  # [P, C]
        phrase_counts = (input_ids == self.llm.phrase_id).sum(1)  # [B]
        first_phrase = phrase_counts.cumsum(0) - phrase_counts

        is_seg = input_ids == self.llm.seg_id
        ordinal = is_seg.cumsum(1) - 1
        is_seg &= ordinal < (phrase_counts[:, None] if is_per_phrase else 1)
        image_index = is_seg.nonzero()[:, 0]  # [R]
        if len(image_index) == 0:
            return None
        own_phrase = first_phrase[image_index] + ordinal[is_seg]

        if is_per_phrase and self.training:
            conditions = phrases.expand(len(image_index), -1, -1)
            is_padding = conditions.new_zeros(conditions.shape[:2], dtype=torch.bool)
        elif is_per_phrase:
            conditions = phrases[own_phrase][:, None]
            is_padding = conditions.new_zeros(conditions.shape[:2], dtype=torch.bool)
        else:
            column = torch.arange(int(phrase_counts.max()), device=states.device)
            is_padding = column >= phrase_counts[image_index][:, None]  # [R, K]
            rows = first_phrase[image_index][:, None] + column
            conditions = phrases[rows.clamp(max=len(phrases) - 1)]
        background = self.background_embedding.weight.expand(len(image_index), 1, -1)
        conditions = torch.cat([conditions, background], dim=1)
        is_padding = F.pad(is_padding, (0, 1))

        queries, mask_embeddings, mask_features = self.segmentor.decode(
            hidden_states, image_index, self.llm_projector(states[is_seg])
        )
        class_logits = self.segmentor.class_head(queries, conditions, is_padding)
        return Predictions(class_logits, mask_embeddings, mask_features, image_index)

    def _phrase_means(self, states: Tensor, number: Tensor) -> Tensor:
        """Means of the projected states of each phrase: [P, C]."""
        inside = number >= 0
        projected = self.llm_projector(states[inside])
        index = number[inside]
        num_phrases = int(index.max()) + 1 if len(index) else 0
        sums = projected.new_zeros(num_phrases, projected.shape[-1]).index_add(0, index, projected)
        return sums / index.bincount(minlength=num_phrases)[:, None]

    @torch.no_grad()
    def infer(self, batch: Batch, max_new_tokens: int) -> tuple[list[str], Predictions | None]:
        """Greedy answers to a left-padded batch, and what their <SEG> tokens segment."""
        visual_tokens, hidden_states = self.visual_tokens(batch)
        embeddings = self.llm.embed(batch.input_ids, visual_tokens)
        new_ids, states, new_states = self.llm.generate(
            embeddings, batch.attention_mask, max_new_tokens
        )
        answers = [
            self.tokenizer.decode(row[row >= 0], skip_special_tokens=False).strip()
            for row in new_ids
        ]
        if batch.task == "chat":
            return answers, None
        input_ids = torch.cat([batch.input_ids, new_ids], dim=1)
        states = torch.cat([states, new_states], dim=1)
        return answers, self.segment(batch.task, hidden_states, states, input_ids)


# ---- reading masks out -----------------------------------------------------------------------------


def original_logits(mask_logits: Tensor, placement: Placement) -> Tensor:
    """Mask logits [N, h, w] of the canvas, read bilinearly at the pixels of the original image:
    [N, H, W]. The padding drops out; no mask of the canvas's full size is made."""
    axes = []
    for original, resized in zip(placement.original, placement.resized, strict=True):
        pixels = (torch.arange(original, device=mask_logits.device) + 0.5) * (resized / original)
        axes.append(2 * pixels / placement.size - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
    sampled = F.grid_sample(
        mask_logits[None].float(), grid[None], padding_mode="border", align_corners=False
    )
    return sampled[0]


def panoptic_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    placement: Placement,
    is_thing: list[bool],
    score_threshold: float,
    overlap_threshold: float,
) -> tuple[np.ndarray, list[dict]]:
    """Panoptic reading of one run: class_logits [Q, K+1], mask_logits [Q, h, w].

    Queries above the score threshold compete for each pixel with score times mask probability; a
    segment of which too little stays visible is dropped; stuff of one class is fused. Returns
    segment numbers int32 [H, W], 0 where there is none, and their {"id", "category", "score"}.
    """
    scores, categories = class_logits.float().softmax(-1).max(-1)
    keep = (categories < class_logits.shape[-1] - 1) & (scores > score_threshold)
    height, width = placement.original
    segment_map, segments = np.zeros((height, width), np.int32), []
    if not keep.any():
        return segment_map, segments
    scores, categories = scores[keep], categories[keep].tolist()
    probabilities = original_logits(mask_logits[keep], placement).sigmoid()
    winner = (scores[:, None, None] * probabilities).argmax(0)
    stuff = {}
    for index, category in enumerate(categories):
        is_inside = probabilities[index] >= 0.5
        mask = (winner == index) & is_inside
        area, whole = int(mask.sum()), int(is_inside.sum())
        if area == 0 or area < overlap_threshold * whole:
            continue
        if not is_thing[category] and category in stuff:
            segment_map[mask.cpu().numpy()] = stuff[category]
            continue
        segments.append(
            {"id": len(segments) + 1, "category": category, "score": float(scores[index])}
        )
        segment_map[mask.cpu().numpy()] = len(segments)
        if not is_thing[category]:
            stuff[category] = len(segments)
    return segment_map, segments


def best_mask(
    class_logits: Tensor, mask_logits: Tensor, placement: Placement
) -> tuple[np.ndarray, float]:
    """Referring reading of one run, class_logits [Q, 2]: the mask of the query that fits the phrase
    best, bool [H, W], and its score."""
    scores = class_logits.float().softmax(-1)[:, 0]
    best = scores.argmax()
    mask = original_logits(mask_logits[best][None], placement)[0] > 0
    return mask.cpu().numpy(), float(scores[best])

"""The tiny world's image models, untrained: StableDiffusion3Pipelines without T5, of a few M parameters.

`pretrain_image_model.py` trains them. There are two, so that what is learnt with one can be tried on the
other: SIZES says in what they differ. Their prompts are lower case. Capitals and digits in a prompt are
characters to draw, and each is a token.
"""

from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from rewards.tiny_world.glyphs import CHARACTERS
from tiny import world

MAX_TOKENS = 24  # the longest prompt of the world has 21 tokens, with its start and end
TEXT_WIDTH = 64  # of the text encoders


class Size(NamedTuple):
    """What an image model is made of."""

    vae_channels: tuple  # of the autoencoder's levels: each level after the first halves the image
    latent_channels: int
    patch_size: int  # of the transformer, in latent pixels
    width: int  # of the transformer
    shift: float  # of the sampler's times towards noise


SIZES = {  # by the name of the folder in tiny/
    "sd3": Size((8, 16, 32, 64), latent_channels=8, patch_size=2, width=128, shift=3.0),
    "sd3b": Size((8, 16, 32, 64), latent_channels=16, patch_size=2, width=96, shift=2.0),
}
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told so, in every call


# ---- tokenizer: one token per word, one per character of a text to draw ----
def vocabulary():
    """All tokens: special ones, characters to draw, and the words of all sentences of the world."""
    phrases = ["a an , text large white center photo of picture"]
    phrases += ["make add remove move replace the to with it is at in on no and"]
    phrases += ["which is colored , of them"]
    tables = (
        world.SHAPE_WORDS,
        world.COLOR_WORDS,
        world.COUNT_WORDS,
        world.RELATION_WORDS,
        world.PLACE_WORDS,
    )
    for table in (*tables, world.SENTENCES, world.HARD_SENTENCES):
        for options in table.values():
            phrases += options
    words = set()
    for phrase in phrases:
        spaced = phrase.replace("{", " {").replace('"', " ")
        words.update(word for word in spaced.split() if "{" not in word)
    for options in world.SHAPE_WORDS.values():
        words.update(world.plural(word) for word in options)
    return ["<pad>", "<start>", "<end>", "<unknown>", '"', *CHARACTERS, *sorted(words)]


def build_tokenizer():
    """A word-level tokenizer in transformers' format, as CLIP's: start and end around a prompt."""
    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    characters = pre_tokenizers.Split(Regex("[A-Z0-9]|[^a-z]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), characters])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    )


# ---- networks ----
def build_vae(size):
    """An autoencoder of factor 8: an image (3, 64, 64) becomes a latent (C, 8, 8), C the latent channels."""
    num_levels = len(size.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        latent_channels=size.latent_channels,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def clip_config(tokenizer, num_layers):
    """The configuration of a CLIP text encoder on the world's words."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_text_encoder(tokenizer):
    """A CLIP text encoder with a projection, as SD3 has two of. SD3 reads its last layer but one."""
    return CLIPTextModelWithProjection(clip_config(tokenizer, num_layers=3))


def build_transformer(size, num_layers=4):
    """SD3's transformer on 16 patches, with the QK norm of SD3.5."""
    latent_size = world.SIZE // 2 ** (len(size.vae_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=size.patch_size,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=size.width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=size.width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=latent_size // size.patch_size,
        qk_norm="rms_norm",
    )
    # Each block starts as the identity, and the output at zero (adaLN-Zero, Peebles & Xie 2023).
    zeroed = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    for name, module in transformer.named_modules():
        if name.endswith(zeroed) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def build_pipeline(size, vae):
    """The pipeline with a given autoencoder, and everything else untrained."""
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=size.shift),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        **NO_T5,
    )

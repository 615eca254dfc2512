"""The tiny world's editor, untrained: a FluxKontextPipeline of a few M parameters.

Without a source image it draws what a prompt says, with one it edits the image as an instruction says. As in
FLUX.1-dev, times are shifted by the size of the image, and the guidance scale is an input of the network.
`pretrain_flux.py` trains it. It has the autoencoder of tiny/sd3, and the same words.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tiny.image_model import TEXT_WIDTH, build_tokenizer, clip_config

WIDTH = 128  # of the transformer: 4 heads of 32


def build_clip(tokenizer):
    """The CLIP text encoder, of which FLUX.1 reads one vector for the whole prompt."""
    return CLIPTextModel(clip_config(tokenizer, num_layers=2))


def build_t5(tokenizer):
    """The T5 encoder, of which FLUX.1 reads a vector for each token."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 2,
        d_ff=4 * TEXT_WIDTH,
        num_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_transformer(latent_channels):
    """FLUX.1's transformer: 2 double blocks and 4 single ones, on 2 x 2 patches of the latent."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # Each block starts as the identity, and the output at zero (adaLN-Zero, Peebles & Xie 2023).
    zeroed = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    for name, module in transformer.named_modules():
        if name.endswith(zeroed) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def build_flux(vae):
    """The pipeline with a given autoencoder, and everything else untrained."""
    tokenizer = build_tokenizer()
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=build_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_t5(tokenizer),
        tokenizer_2=tokenizer,
        transformer=build_transformer(vae.config.latent_channels),
    )

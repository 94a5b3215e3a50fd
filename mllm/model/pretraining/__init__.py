"""What comes before alignment: contrastive vision encoders (CLIP, SigLIP) and BLIP-2's first stage.

The losses are in `contrastive`, the two models in `dual_encoder` and `qformer_pretraining`, their common
processor in `pair_processing`; `compose` builds models from parts.
"""

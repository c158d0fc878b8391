"""A small text-to-image model with Stable Diffusion's layout, its data, its training and its judge.

`model.model_path()` is the trained pipeline. `scenes` draws and captions pictures, `tokenizer` and `networks` define
the model, `vae_stage`, `denoiser_stage` and `decoder_stage` train it, `train` is the command, `export` and `card`
write the pipeline, `judge` and `score` say whether pictures obey their prompts.
"""

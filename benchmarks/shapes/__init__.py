"""A small text-to-image model with Stable Diffusion's layout, its scenes, and the judges of its images.

`model.model_path()` is the trained pipeline. `scenes` renders and captions scenes. `judge` and `judge_net` find out
whether an image obeys its prompt. `training/` trained the model and the judge network; the wheel does not have it.
"""

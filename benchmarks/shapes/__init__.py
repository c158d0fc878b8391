"""A small text-to-image model with Stable Diffusion's layout, its scenes, and the judge of its images.

`model.model_path()` returns the directory of the trained pipeline. `scenes` renders and describes scenes. `judge_net`
finds the objects in an image, and `judge` compares them with the prompt. `training/` is the code that trained the model
and the judge network; it is not in the wheel.
"""

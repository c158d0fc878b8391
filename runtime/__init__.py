"""Running a pair of engines: the UNet replacement, whole pipelines, generations, batching, tuning and serving."""

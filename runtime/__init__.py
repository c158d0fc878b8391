"""Running a pair of engines: schedules, generations, the UNet stand-in, and whole pipelines."""

"""What a run does beside training: keep checkpoints, show and log how fast it goes."""

"""The engine: scheduler, sampler, and `submit / step / cancel` over the latent cache."""

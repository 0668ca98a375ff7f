"""The engine inside a diffusers pipeline, and a UNet2DModel inside the engine: python examples/with_diffusers.py"""

import torch
from diffusers import DDPMScheduler, UNet2DModel

from sgm_engine import Engine
from sgm_engine.integrations.diffusers import PlanPipeline, score_model

unet = UNet2DModel(
    16, block_out_channels=(32, 32), down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2
).eval()  # or .from_pretrained(…): these weights are random
pipe = PlanPipeline(unet, DDPMScheduler())
generators = [torch.Generator().manual_seed(i) for i in range(4)]  # one an image: the same in any batch of 4
pipe(batch_size=4, generator=generators, num_inference_steps=10).images[0].save("with_diffusers.png")
print(Engine(score_model(unet, DDPMScheduler(), 10), batch=4).sample(8, seed=1).shape)

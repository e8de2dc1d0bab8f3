"""Trains a transformer with its saved activations on an SSD: `quickstart.py [DIRECTORY]`."""

import sys

import torch

import offload

path = sys.argv[1] if len(sys.argv) > 1 else "/var/tmp"
layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with offload.ActivationOffload(tier="ssd", path=path) as act:
    for step in range(10):
        batch = torch.randn(16, 128, 256)
        with act.forward():  # what autograd saves in here goes to the SSD
            loss = (model(batch) - batch.sin()).square().mean()
        loss.backward()  # and comes back in here
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    stats = act.stats()

print(f"{stats.offloaded_bytes / 2**20:.0f} MiB offloaded by {stats.io_engine}")

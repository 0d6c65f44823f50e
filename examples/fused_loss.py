"""Our step and loss in a trainer of your own: a velocity network, its latents, rewards. No extras.

Run: python examples/fused_loss.py
"""

import torch

import dancegrpo_fast as grpo

steps, samples, shape = 8, 24, (4, 8, 8)
schedule = grpo.dance_schedule(steps, shift=3.0)  # or grpo.from_scheduler(your_scheduler, steps)
network = torch.nn.Conv2d(4, 4, 3, padding=1)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
root = grpo.NoiseKey.from_seed(0)

for iteration in range(60):
    key, trajectory = root.fold_in(iteration), []
    x = grpo.normal_batch(shape, [key.draw()], copies=samples)[0]  # the group shares one noise
    for i in range(steps):
        kind = "sde" if i < steps - 1 else "x0"  # the last step decodes x0
        move = grpo.transition(schedule, i, i + 1, dynamics="dance", kind=kind, level=0.7)
        rows = grpo.coefficient_table([move] * samples)
        keys = [key.fold_in(i).fold_in(n).draw() for n in range(samples)]
        with torch.no_grad():
            x_next, old = grpo.sample_transition(network(x), x, rows, keys=keys)
        trajectory.append((x, x_next, rows, old))
        x = x_next

    rewards = -(x[:, 0] - 1).abs().mean((1, 2))  # channel 0 should be one
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    for x, x_next, rows, old in trajectory[:-1]:
        out = grpo.policy_loss(
            network(x), x, x_next, rows, advantages, old_log_prob=old, divisor=samples * (steps - 1)
        )
        out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if iteration % 10 == 9:
        print(f"iteration {iteration + 1:3d}   reward {rewards.mean():+.4f}")

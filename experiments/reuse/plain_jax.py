"""P-KL in a training loop of plain jax: a small MLP learns from a teacher with another tokenizer.

python experiments/reuse/plain_jax.py
"""

import jax
import jax.numpy as jnp
import two_tokenizers as data

from xtoken_jax.losses import masked_mean, projection_kl, valid_chunks

WIDTH, STEPS, RATE = 32, 300, 1.0


def init(key):
    keys = jax.random.split(key, 3)
    shapes = {"embed": (data.V_S, WIDTH), "hidden": (WIDTH, WIDTH), "out": (WIDTH, data.V_S)}
    return {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def student(params, ids):
    """Logits [B, T, V_s] of the next token, given the last one."""
    x = params["embed"][ids]
    x = x + jax.nn.gelu(x @ params["hidden"])
    return x @ params["out"]


def loss(params, ids, teacher_logits, alignment, w):
    values = projection_kl(student(params, ids), teacher_logits, alignment, w, merge="mean_normalized")
    return masked_mean(values, valid_chunks(alignment))


@jax.jit
def step(params, *batch):
    value, gradient = jax.value_and_grad(loss)(params, *batch)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), value


params = init(jax.random.key(0))
batch = (data.student_ids, jnp.asarray(data.teacher_logits), data.alignment, data.W.split())
for number in range(STEPS + 1):
    params, value = step(params, *batch)
    if number % 50 == 0:
        print(f"step {number:3}  P-KL {value:.4f}")

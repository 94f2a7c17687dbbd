"""P-KL with a student written in Equinox, and a W that is trained with it.

pip install 'xtoken-jax[reuse]'
python experiments/reuse/equinox_student.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import two_tokenizers as data

from xtoken_jax.losses import masked_mean, next_token_cross_entropy, projection_kl, valid_chunks

WIDTH, STEPS, RATE = 32, 300, 1.0


class Student(eqx.Module):
    """Logits of the next token, given the last one."""

    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.embed = eqx.nn.Embedding(data.V_S, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, data.V_S, WIDTH, depth=1, activation=jax.nn.gelu, key=keys[1])

    def __call__(self, token: jax.Array) -> jax.Array:
        return self.mlp(self.embed(token))


def loss(trained, ids, teacher_logits, alignment):
    student, w = trained
    logits = jax.vmap(jax.vmap(student))(ids)
    kd = masked_mean(
        projection_kl(logits, teacher_logits, alignment, w, merge="mean_normalized"), valid_chunks(alignment)
    )
    ce = masked_mean(*next_token_cross_entropy(logits, ids, jnp.ones(ids.shape, bool)))
    return kd + 0.1 * ce, kd


@eqx.filter_jit
def step(trained, *batch):
    # Of W only the logits are of floating point, so that Equinox trains them and leaves the indices alone.
    (_, kd), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(trained, *batch)
    return eqx.apply_updates(trained, jax.tree.map(lambda g: -RATE * g, gradient)), kd


trained = (Student(jax.random.key(0)), data.W.learnable())
batch = jax.tree.map(jnp.asarray, (data.student_ids, data.teacher_logits, data.alignment))
for number in range(STEPS + 1):
    trained, kd = step(trained, *batch)
    if number % 50 == 0:
        print(f"step {number:3}  P-KL {kd:.4f}")
moved = jnp.abs(trained[1].projection().weights - data.W.weights).max()
print(f"largest change of an entry of W: {moved:.4f}")

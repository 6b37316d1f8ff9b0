"""On-policy distillation of Qwen3 on chats: 1.7B, or 4B, into 0.6B, which writes the answers.

The student answers the prompts of Tulu-3 (Lambert et al. 2024, arXiv:2411.15124), and learns the
teacher's distribution at every token of its answer by reverse KL: the recipe of the Qwen3 report
(arXiv:2505.09388, section 4.5) and of GKD (Agarwal et al. 2023, arXiv:2306.13649). The learning
rate, lengths and numbers of steps are choices of this project.

    python -m kd_jax.plan --config=configs/onpolicy_qwen3.py --topology=v5e:4x4
    python -m kd_jax.main --config=configs/onpolicy_qwen3.py --workdir=runs/onpolicy_qwen3
    python -m kd_jax.main --config=configs/onpolicy_qwen3.py:smoke

Arguments: 1.7b (default), 4b: the teacher; `-smoke` behind one runs it tiny, on made-up chats. For
a TPU v5e-16, or GPUs of 80 GB with another mesh.fsdp; on a cluster: launch/. docs/on_policy.md has
the memory and FLOPs that the plan forecasts; the run has not been made here.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    name, smoke = config.split(arg, ("1.7b", "4b"), "1.7b")
    c = config.on_policy()
    c.task = dict(name="chat", seq_len=2048, turns="last", packed=False)
    c.data = dict(train=dict(source="hub", path="allenai/tulu-3-sft-mixture"), held_out=0.005)
    c.teacher.model = f"Qwen/Qwen3-{name.upper()}"
    c.student.model, c.student.init = "Qwen/Qwen3-0.6B", "model"
    c.objective = dict(reverse_kl=dict(weight=1.0))
    c.rollout.update(prompt_tokens=512, max_new_tokens=512, held_out=64)
    c.mesh.fsdp, c.remat = 16, True
    c.batch_size, c.accumulate, c.steps = 64, 4, 500
    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.0
    c.optim.schedule = dict(kind="cosine", warmup=0.03)
    c.eval = dict(every=100, batch_size=16)
    c.checkpoint = dict(every=100, keep=1)
    return or_smoke(c, "smoke" if smoke else None, family="qwen3")

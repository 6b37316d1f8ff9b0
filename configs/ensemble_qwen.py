"""A sequential ensemble of small students: Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct.

After slm_ensembles, "Distilling Large Language Models into Small LM Ensembles": round after round a
student is trained on Tulu-3 so that the mean of its logits and those of the members before it meets
the teacher's. Theirs are the models, the data, 6 rounds of 1,000 steps of 16 conversations of up to
1,024 tokens, AdamW at 2e-5 with 50 steps of warm-up, and the hybrid loss of their description: KL
to the teacher and the student's own next-token loss. What their code does instead is in
configs/ensemble_qwen_faithful.py.

Chosen here: all rounds read the same 16,000 rows, in another order, so that the teacher's logits
are computed once and the members' mean is updated once a round, both kept on disk; a step then
costs the same in every round. All turns of the assistant are learnt; conversations are packed.

    python -m kd_jax.plan --config=configs/ensemble_qwen.py --topology=v5e:4x4
    python -m kd_jax.main --config=configs/ensemble_qwen.py --workdir=runs/ensemble_qwen
    python -m kd_jax.main --config=configs/ensemble_qwen.py:smoke

Data: Tulu-3 from the hub, 64 logits a token on disk (about 9 GB a signal). Hardware: a v5e-16 or
GPUs of 80 GB; not run at this size here.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.ensemble()
    c.task = dict(name="chat", seq_len=1024)
    c.data = dict(
        train=dict(source="hub", path="allenai/tulu-3-sft-mixture", split="train[:200000]"),
        held_out=0.01,
    )
    c.teacher.model = "Qwen/Qwen2.5-1.5B-Instruct"
    c.student.model = "Qwen/Qwen2.5-0.5B-Instruct"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.rounds, c.steps, c.batch_size = 6, 1000, 16
    c.ensemble.rows = 16_000
    c.mesh.fsdp = 4
    c.remat = True
    c.optim.learning_rate = 2e-5
    c.optim.weight_decay = 0.0
    c.optim.schedule = dict(kind="linear", warmup=50)
    c.eval = dict(every=250, batch_size=16)
    c.checkpoint = dict(every=250, keep=1)
    return or_smoke(c, arg, family="qwen2")

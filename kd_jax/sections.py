"""Defines every section of a training config: its keys, their defaults, meanings, types and ranges.

A section is a table, key -> (default, meaning). A number's default is part of its range
(kd_jax/ranges.py); for other keys the default's type is the type, and {} is a section that its
reader checks.
"""

from typing import Any

from kd_jax.ranges import Choice, Free, Real, Whole

Table = dict[str, tuple[Any, str]]  # key -> (default, meaning)


def _whole(default: int, least: int = 1, most: int | None = None) -> Whole:
    return Whole(least=least, most=most, default=default)


def _real(default: float, least: float = 0, **bounds: float) -> Real:
    return Real(least=least, default=default, **bounds)


def _rows(default: int) -> Whole:
    return _whole(default, most=2**20)  # more are a slip of the hand


RUN: Table = dict(
    recipe=("", "kd_jax/recipes/RECIPE.py, or one of ALIASES there"),
    seed=(_whole(0, 0, 2**32 - 1), "of initialisation, order of the data, masks and dropout"),
    precision=(Choice("fp32", "bf16", default="bf16"), "of products; parameters are float32"),
    batch_size=(_rows(256), "global rows a step, a multiple of devices x accumulate"),
    accumulate=(_whole(1), "micro-batches a step, exact"),
    remat=(False, "compute blocks again in the backward pass: less memory, more time"),
    remat_keeps=(Choice("", "products"), "what remat does not compute again: nothing | products"),
    scan=(
        Choice("auto", "always", "never"),
        "run equal blocks as one loop, so that compile time does not grow with depth; auto: where "
        "the mesh splits parameters",
    ),
    steps=(_whole(100_000), "optimizer steps a stage"),
    stages=({}, "stage -> what differs there; its keys are those of `stages.NAME`"),
    objective=({}, "of the student: term -> settings (kd_jax/objectives)"),
    task=({}, "name: kd_jax/tasks/NAME.py, and its keys"),
    data=({}, "train, validation, test, held_out: kd_jax/data/splits.py"),
    resume=("", "RUN/STAGE whose last checkpoint the student goes on from"),
    wandb=("", "project name: also log to Weights & Biases"),
)
# Of some recipes.
MORE: Table = dict(
    vocab_chunk=(_whole(0, 0), "rows of logits that exist at a time; 0: as many as fill 128 MB"),
    epochs=(_real(3.0, most=1e6), "passes over the training examples, a stage"),
    patience=(_whole(0, 0), "evaluations without a better one that end a stage; 0: none do"),
    average=(Choice("logits", "probabilities"), "what several teachers are averaged in"),
    teachers=({}, "further teachers: name -> a section like `teacher`"),
    intermediate=({}, "objective of the stage `intermediate`, before the student's"),
    rounds=(_whole(6), "of an ensemble, of `steps` steps; each adds a member"),
)
MODEL: Table = dict(
    model=("", "hub id or local folder of an HF checkpoint; empty for none"),
    revision=("main", "branch, tag or commit of a hub id"),
    architecture=({}, "keys of HF's config.json in place of the checkpoint's, or the teacher's"),
    embedding=(
        {},
        "of a sentence embedder, in place of what its folder says, or the teacher: pooling (mean | "
        "cls | last | max), dense (width of a layer behind it; 0: none), activation (of that "
        "layer: linear | tanh | relu | gelu | silu), normalize, dimensions (the first; 0: all)",
    ),
)
STUDENT: Table = MODEL | dict(
    init=(Choice("teacher", "model", "scratch"), "layers of the teacher, checkpoint, or random"),
    layers=(Free("uniform"), "uniform | first | last | a list from 0, for init=teacher"),
)
SECTIONS: dict[str, Table] = dict(
    mesh=dict(
        fsdp=(_whole(1), "devices that share one copy of the parameters"),
        model=(_whole(1), "devices that share the work on each row: heads, FFN columns, ids"),
        reduction=(
            Choice("float32", "bfloat16"),
            "type in which the gradients of kernels are summed over the devices of fsdp",
        ),
    ),
    teacher=MODEL
    | dict(
        init=(Choice("", "scratch"), "random, with neither a checkpoint nor a stage to train it"),
        weight=(_real(1.0), "its share among several teachers"),
        labels=((), "its class names, in its own order, where it is taken as it is without names"),
    ),
    student=STUDENT,
    assistant=STUDENT,  # between teacher and student, where there is a stage `assistant`
    tokenizer=dict(
        path=("", "a folder or hub id; where there is no `train` either, the teacher's own"),
        train=(Choice("", "wordpiece", "bpe"), "trained on the training text"),
        vocab_size=(_whole(30_522), "of the one that is trained"),
    ),
    optim=dict(
        learning_rate=(_real(5e-4), "the peak"),
        schedule=(dict(kind="linear", warmup=0.05), "kd_jax/schedules.py"),
        weight_decay=(_real(0.01), "of AdamW, of matrices"),
        beta1=(_real(0.9, below=1), "of AdamW"),
        beta2=(_real(0.999, below=1), "of AdamW"),
        # Of 0, and of what float32 takes for it, an update of a gradient of 0 is 0 / 0.
        epsilon=(_real(1e-8, 1e-30), "of AdamW"),
        clip_norm=(_real(1.0), "global norm of the gradient; 0: no clipping"),
        learning_rate_multipliers=(((".*", 1.0),), "(regex, factor), first match; 0 freezes"),
    ),
    eval=dict(every=(_whole(1000), "steps"), batch_size=(_rows(64), "global rows")),
    checkpoint=dict(
        every=(_whole(1000), "steps"),
        keep=(_whole(2), "the last N, besides the best"),
    ),
    log=dict(every=(_whole(50), "steps between rows of timing.csv")),
    cache=dict(
        max_gb=(_real(10.0), "of logits on disk; 0: teachers of classifiers run at every step"),
        folder=("", "where they are kept; empty: $KD_JAX_CACHE"),
        logits=(
            Choice("", "all", "top_k", "rskd"),
            "of language models' teachers: of each token all, or the largest and the mean of the "
            "others' probabilities, or ids drawn by their probabilities; empty: the teacher runs "
            "at every step",
        ),
        top_k=(_whole(64), "logits of a token that logits='top_k' keeps"),
        tail=(
            Choice("uniform", "bucket", "renormalised"),
            "where the others' probability goes: to each alike; as the student has it, so that "
            "their sum is compared; nowhere, and the largest have it all",
        ),
        draws=(_whole(50), "ids of a token that logits='rskd' draws"),
    ),
    cost=dict(repeats=(_whole(100), "timed calls a model, for latency and throughput")),
    pruning=dict(
        target=(_real(0.3, below=1), "share of all parameters that goes; 0: as substitution's"),
        ranking=(Choice("global", "layer"), "what heads and FFN columns compete with"),
        distil=(True, "fine-tuned on the objective, from the original; else on the labels"),
    ),
    substitution=dict(
        kind=(Choice("bottleneck", "slim"), "of compact blocks: kd_jax/models/model_config.py"),
        width=(_whole(1, 0), "inside a bottleneck; 0 for slim blocks, as wide as the model"),
        num_heads=(_whole(1), "of a compact block"),
        num_kv_heads=(_whole(1), "of a compact block"),
        ffn_width=(_whole(1), "of a compact block"),
        init=("random", "random | pruned (kd_jax/models/compact.py): how a compact block begins"),
        fit_steps=(_whole(0, 0), "steps of regression to the blocks that go, before each swap"),
        fit_learning_rate=(_real(1e-3), "of these steps"),
        order=(Free("last_first"), "last_first | first_first | importance | a list of blocks"),
        importance_batches=(_whole(16), "training batches that importance is measured on"),
        blocks=(_whole(1), "to replace at each swap"),
        steps=(_whole(1000), "from one swap to the next"),
        target=(_real(0.3, below=1), "share of all parameters that goes, then swaps end"),
        learning_rate=(_real(5e-4), "of compact blocks, the peak; optim.learning_rate: all else"),
        warmup=(_whole(50, 0), "updates in which a new block's learning rate is reached"),
    ),
    theseus=dict(
        group=(_whole(2, 0), "teacher's blocks to a successor; 0: those that substitution takes"),
        layers=(Free("first"), "uniform | first | last | a list: what successors begin as"),
        rate=(Free(0.5), "probability of a successor: a number, or a schedule over `steps`"),
        steps=(Real(above=0, default=0.5), "of replacement, or a share of the stage below 1"),
    ),
    ensemble=dict(
        space=(Choice("logits", "probabilities"), "what members are averaged in"),
        start=(Choice("student", "previous"), "what a round begins as; student: as configured"),
        rows=(_whole(0, 0), "of training text, the same in every round; 0: all"),
        fresh=(False, "new text in every round, teacher and members in the step"),
        top_k=(_whole(64), "logits of a token that are kept where cache.max_gb is too little"),
        weights=(Choice("equal", "learned"), "of the members; learned: on held-out text"),
        past_run_dirs=((), "finished runs whose members come first"),
        eval_mean=(Choice("token", "batch"), "mean over all tokens, or over means of batches"),
    ),
    rollout=dict(
        {
            "lambda": (
                Free(1.0),
                "share of the steps whose completions the student writes, of the others they are "
                "the data's: a number, or a schedule",
            )
        },
        every=(_whole(1), "steps that learn from the same completions"),
        prompt_tokens=(_whole(16), "of a document that are its prompt; of chats the longest one"),
        max_new_tokens=(_whole(128), "of a completion"),
        temperature=(_real(1.0), "of writing; objective.TERM.temperature is that of the loss"),
        top_p=(Real(above=0, most=1, default=1.0), "probability of the tokens that are drawn from"),
        top_k=(_whole(0, 0), "most probable tokens that are drawn from; 0: all"),
        stop=((), "tokens that end a completion, besides the end of a turn, or of a document"),
        unfinished=(Choice("learn", "leave"), "completions cut off at max_new_tokens"),
        held_out=(_rows(32), "prompts of held-out text, continued at every evaluation"),
        samples=(_whole(4, 0), "of these that samples.jsonl keeps"),
    ),
    sweep=dict(
        stage=("student", "the stage that is tried; stages before it run once"),
        keys=((), "pairs: a dotted key, and a list of values or for a sampler {low, high[, log]}"),
        sampler=(Choice("grid", "random", "tpe"), "every combination, or one of Optuna's samplers"),
        trials=(_whole(20), "how many, for a sampler"),
    ),
)

"""Writes a model as a Hugging Face checkpoint that loads in PyTorch `transformers`.

    python -m kd_jax.export --workdir=RUN [--stage=student] --out=DIR
    python -m kd_jax.export --model=FOLDER_OR_HUB_ID [--revision=...] --out=DIR

The folder gets model.safetensors, config.json, generation_config.json where there was one, the
tokenizer and a model card. Before it takes its place it is loaded again, by kd_jax and (where torch
is installed) by PyTorch, and the logits are compared, also while PyTorch generates text. A decoder
whose blocks differ in size has no class in HF and comes with its modeling file: load it with
trust_remote_code=True. With --onnx an encoder that classifies, scores pairs or makes vectors is
also written as onnx/model.onnx and, with weights of 8 bits, onnx/model_qint8.onnx; onnx.json and
the card say how far they agree and how fast they are on this machine. A finished run has its
student in RUN/export/student already; this command exports other stages or to other places, and
converts checkpoints.
"""

from collections.abc import Sequence

from kd_jax import flags


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("export", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", metavar="RUN", help="directory of a finished run")
    what.add_argument("--model", help="folder of an HF checkpoint, or its id on the HF hub")
    parser.add_argument(
        "--stage", help="of the run; by default the one that it is about, such as student"
    )
    parser.add_argument("--revision", help="of the hub id: branch, tag or commit")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to; must be empty")
    parser.add_argument("--onnx", action="store_true", help="of an encoder: also ONNX files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Exports the model named in `argv`; prints the path and the largest difference of a logit."""
    args = parser().parse(argv)
    from kd_jax import cli
    from kd_jax.errors import UserError
    from kd_jax.recipes import export

    with cli.plain_errors():
        cli.check_folder("--out", args.out)
        if args.revision if args.workdir else args.stage:
            flags = ("--revision", "--workdir") if args.workdir else ("--stage", "--model")
            raise UserError(f"{flags[0]} does not go with {flags[1]}; leave it out")
        cli.start_jax()
        if args.workdir:
            done = export.export_stage(args.workdir, args.stage, args.out, args.onnx)
        else:
            done = export.export_checkpoint(args.model, args.revision, args.out, args.onnx)
    print(f"wrote {done['path']}")
    for loader, difference in done["max_logit_difference"].items():
        print(f"loaded again with {loader}: logits differ by {difference:.1e} at most")
    for each in done.get("onnx", {"files": {}})["files"].values():
        alike = (
            f", {done['onnx']['agreement']} {each['agreement']:.4f}" if "agreement" in each else ""
        )
        print(
            f"{each['file']}: {each['mb']:.1f} MB, {each['throughput']:,.0f} texts/s, one in "
            f"{each['latency_ms']:.1f} ms, differs by {each['max_difference']:.1e}{alike}"
        )


if __name__ == "__main__":
    main()

"""What the stages of a run share: a plain `Run`, its models, teachers, figures and directory."""

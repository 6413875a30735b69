"""`python -m llmtk`, which launchers take: `torchrun --nproc-per-node 2 -m llmtk run sft`."""

from llmtk.cli import main

if __name__ == "__main__":
    main()

"""Instruction data: sources whose documents are the paper's templates (Table 5) filled from
published files."""

"""What a launch needs: the architecture, the arguments' types, dependent launches, the interpreter."""

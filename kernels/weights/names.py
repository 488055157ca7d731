"""The names of the formats that a weight is quantized to, without torch: the command line has them in its help."""

FORMAT_NAMES = ("int4", "int8", "fp8")

"""The names of Gemma's special pieces."""

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
# These are special in every Gemma 3 checkpoint, whatever its files say about them.
SPECIAL_PIECES = frozenset(
    {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}
    | {START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN}
)
SPACE = "▁"  # how a piece writes a space

"""The tiny world's writing: a 5 x 7 dot-matrix alphabet and its reader, by template overlap, no weights."""

import torch
import torch.nn.functional as F

from rewards.tiny_world.shapes import BACKGROUND, crop_to_grid, measure_components, overlap

ROWS = 7  # of dots, each of five
COLUMNS = 5
FONT = {  # a hexadecimal pair per row of dots
    "A": "0E11111F111111",
    "B": "1E11111E11111E",
    "C": "0E11101010110E",
    "D": "1C12111111121C",
    "E": "1F10101E10101F",
    "F": "1F10101E101010",
    "G": "0E11101713110F",
    "H": "1111111F111111",
    "I": "0E04040404040E",
    "J": "0702020202120C",
    "K": "11121418141211",
    "L": "1010101010101F",
    "M": "111B1515111111",
    "N": "11111915131111",
    "O": "0E11111111110E",
    "P": "1E11111E101010",
    "Q": "0E11111115120D",
    "R": "1E11111E141211",
    "S": "0F10100E01011E",
    "T": "1F040404040404",
    "U": "1111111111110E",
    "V": "11111111110A04",
    "W": "1111111515150A",
    "X": "11110A040A1111",
    "Y": "1111110A040404",
    "Z": "1F01020408101F",
    "0": "0E11131519110E",
    "1": "040C040404040E",
    "2": "0E11010204081F",
    "3": "1F02040201110E",
    "4": "02060A121F0202",
    "5": "1F101E0101110E",
    "6": "0608101E11110E",
    "7": "1F010204080808",
    "8": "0E11110E11110E",
    "9": "0E11110F01020C",
}
CHARACTERS = "".join(FONT)
GRID_W = 15  # templates are compared on so many points of the component's box
GRID_H = 21
MIN_AREA = 16  # pixels of a component; the thinnest glyph covers about 70
MIN_OVERLAP = 0.7  # below it a component is unreadable; benchmark/measure_reader.py shows why not lower
FOREGROUND_LUMA = 0.45


def bitmap(character):
    """(7, 5) bool, True where a dot is set."""
    dots = []
    for row in range(ROWS):
        bits = int(FONT[character][2 * row : 2 * row + 2], 16)
        dots.append([bool(bits >> (COLUMNS - 1 - column) & 1) for column in range(COLUMNS)])
    return torch.tensor(dots)


def templates():
    """Each glyph stretched over its own box, and the box's w/h: (36, GRID_H, GRID_W) bool, (36,) float."""
    grids = []
    aspects = []
    for character in CHARACTERS:
        dots = bitmap(character)
        columns = torch.nonzero(dots.any(0)).flatten()
        dots = dots[:, columns[0] : columns[-1] + 1].float()
        stretched = F.interpolate(dots[None, None], (GRID_H, GRID_W), mode="nearest-exact")[0, 0]
        grids.append(stretched > 0.5)
        aspects.append(dots.shape[1] / dots.shape[0])
    return torch.stack(grids), torch.tensor(aspects)


@torch.no_grad()
def read(images, min_overlap=MIN_OVERLAP):
    """The characters in each image, left to right. images (B, 3, H, W) float in [0, 1] -> B strings.

    A component that looks like no glyph is left out, so an image without writing reads as the empty string.
    min_overlap: how well a component must overlap with a glyph, from 0 to 1.
    """
    background = torch.tensor(BACKGROUND, device=images.device).float().mean() / 255
    mask = images.float().mean(dim=1) - background > FOREGROUND_LUMA  # (B, H, W)
    components = measure_components(mask, MIN_AREA)
    box = components.box
    texts = [""] * len(images)
    if len(box) == 0:
        return texts
    grids, aspects = templates()
    crops = crop_to_grid(components, GRID_H, GRID_W)
    similarity = overlap(crops, grids.to(images.device))  # (N, 36)
    # stretching over the box hides the width, which alone tells an I from a block: compare it too
    size = (box[:, 2:] - box[:, :2]).float()
    aspect = size[:, :1] / size[:, 1:]
    similarity = similarity - (aspect - aspects.to(images.device)).abs()
    quality, character = similarity.max(dim=1)
    for n in torch.argsort(box[:, 0]).tolist():
        if quality[n] >= min_overlap:
            texts[int(components.owner[n])] += CHARACTERS[int(character[n])]
    return texts

"""The tiny world's detector: finds its eight shapes and their colours, from first principles.

Foreground = far from the background colour; objects = connected components; shape = best overlap with a
template stretched over the component's box; colour = nearest palette entry. Batched torch, about a
millisecond per image. The palette and the geometry are defined here, once; `tiny/world.py` draws with them,
so drawing and detecting agree.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from rewards.geneval.detection import Detection, place_of

CLASSES = ("circle", "square", "triangle", "cross", "star", "heart", "moon", "hourglass")
BACKGROUND = (16, 16, 28)
PALETTE = {
    "red": (230, 50, 50),
    "green": (50, 200, 70),
    "blue": (60, 100, 245),
    "yellow": (240, 220, 50),
    "purple": (190, 70, 230),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
    "cyan": (50, 215, 225),
}
# RGB distance to the background, colours in [0, 1]; an edge pixel counts from about half
FOREGROUND_DISTANCE = 0.28
MIN_AREA = 24  # pixels: smaller specks are decoder noise; the smallest object drawn covers about 70
MIN_OVERLAP = 0.65  # intersection over union with the best template; below it the component is "no shape"
MAX_SIZE = 0.5  # of the image's width: a filled image is no square; the largest object drawn takes 0.31
MAX_ASPECT = 1.35  # every class fills a square box, so a stretched component is none of them
GRID = 24  # templates are compared on GRID x GRID points of the component's box
ARM = 0.36  # half the width of a cross's arms, in half-sizes
WAIST = 0.2  # half the width of an hourglass in its middle, in half-sizes


def filling_the_box(points):
    """A polygon's corners, stretched so that its box is -1 to 1 in both directions: (M, 2)."""
    points = torch.tensor(points, dtype=torch.float32)
    low = points.amin(dim=0)
    high = points.amax(dim=0)
    return (points - low) / (high - low) * 2 - 1


def star_corners():
    """Five points, one of them up. The inner corners are half as far from the centre as the outer ones."""
    corners = []
    for k in range(10):
        radius = 1.0 if k % 2 == 0 else 0.5
        angle = math.pi * k / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return filling_the_box(corners)


def heart_corners():
    """The heart curve that is drawn with sines and cosines, at 40 angles."""
    corners = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((x, -y))
    return filling_the_box(corners)


def moon_corners():
    """A crescent that is open to the right: an outer arc down, and a flatter inner arc back up."""
    corners = []
    for k in range(21):
        angle = math.pi * (0.5 + k / 20)
        corners.append((math.cos(angle), -math.sin(angle)))
    for k in range(1, 20):
        angle = math.pi * (1.5 - k / 20)
        corners.append((0.4 * math.cos(angle), -math.sin(angle)))
    return filling_the_box(corners)


POLYGONS = {  # the corners of each shape that has no simpler formula: (M, 2), as u and v
    "star": star_corners(),
    "heart": heart_corners(),
    "moon": moon_corners(),
    "hourglass": torch.tensor([[-1, -1], [1, -1], [WAIST, 0], [1, 1], [-1, 1], [-WAIST, 0]]),
}


def inside_polygon(corners, u, v):
    """Signed distance to a polygon's edge, positive inside. corners (M, 2); u, v broadcast to (H, W)."""
    start = corners.to(u.device)
    end = start.roll(-1, dims=0)
    u, v = torch.broadcast_tensors(u, v)
    u = u[..., None]  # (H, W, 1), against M edges
    v = v[..., None]
    start_u, start_v = start.unbind(dim=1)  # (M,) each
    end_u, end_v = end.unbind(dim=1)
    along_u = end_u - start_u
    along_v = end_v - start_v
    # The nearest point of each edge.
    share = ((u - start_u) * along_u + (v - start_v) * along_v) / (along_u**2 + along_v**2)
    share = share.clamp(0, 1)
    distance = torch.hypot(u - start_u - share * along_u, v - start_v - share * along_v)
    nearest = distance.amin(dim=-1)
    # A point is inside where a ray to its right crosses the edges an odd number of times.
    spans = (start_v > v) != (end_v > v)
    level = torch.where(along_v == 0, 1.0, along_v)  # a lying edge spans nothing
    crossing = start_u + (v - start_v) * along_u / level
    is_inside = (spans & (crossing > u)).sum(dim=-1) % 2 == 1
    return torch.where(is_inside, nearest, -nearest)


def inside(shape, u, v):
    """Signed distance to the shape's edge, positive inside; u, v in half-sizes, v pointing down."""
    sideways = u.abs()
    upright = v.abs()
    if shape == "circle":
        radius = (u**2 + v**2) ** 0.5
        return 1 - radius
    if shape == "square":
        return 1 - torch.maximum(sideways, upright)
    if shape == "triangle":  # apex up, as wide as it is high
        base = 1 - v
        side = ((v + 1) / 2 - sideways) / 1.25**0.5
        return torch.minimum(base, side)
    if shape == "cross":
        lying = torch.minimum(1 - sideways, ARM - upright)
        standing = torch.minimum(ARM - sideways, 1 - upright)
        return torch.maximum(lying, standing)
    if shape in POLYGONS:
        return inside_polygon(POLYGONS[shape], u, v)
    raise ValueError(f"unknown shape {shape!r}, expected one of {CLASSES}")


def connected_components(mask):
    """Labels 8-connected components. mask (B, H, W) bool -> (B, H, W) int64, 0 outside, ids unique over the
    batch.

    Each pixel takes the largest id among its neighbours until nothing changes; ids start as pixel numbers.
    """
    numbers = torch.arange(1, mask.numel() + 1, device=mask.device)
    ids = numbers.view_as(mask) * mask
    while True:
        # the largest of three neighbours in a row, then of three rows
        wide = F.pad(ids, (1, 1))
        left = wide[:, :, :-2]
        right = wide[:, :, 2:]
        grown = torch.maximum(ids, left)
        grown = torch.maximum(grown, right)
        tall = F.pad(grown, (0, 0, 1, 1))
        above = tall[:, :-2]
        below = tall[:, 2:]
        grown = torch.maximum(grown, above)
        grown = torch.maximum(grown, below)
        grown = grown * mask
        if torch.equal(grown, ids):
            return ids
        ids = grown


class Components(NamedTuple):
    """The N connected components of a batch of masks (B, H, W)."""

    labels: torch.Tensor  # (B, H, W) int64: 0 = none, n + 1 = component n
    owner: torch.Tensor  # (N,) int64, the image that each component is in
    box: torch.Tensor  # (N, 4) int64 as x0, y0, x1, y1 with x1, y1 exclusive


def measure_components(mask, min_area):
    """The `Components` of a batch of masks (B, H, W) bool, without those under min_area pixels."""
    ids = connected_components(mask)
    b, y, x = torch.nonzero(mask, as_tuple=True)  # only foreground pixels from here on: a few percent of all
    _, component, area = ids[b, y, x].unique(return_inverse=True, return_counts=True)
    keep = area >= min_area
    N = int(keep.sum())
    new_number = torch.cumsum(keep, 0) * keep  # of each component, from 1; 0 where it is dropped
    number = new_number[component]  # of each pixel's component
    labels = torch.zeros_like(ids)
    labels[b, y, x] = number

    kept = number > 0
    number = number[kept] - 1  # from 0
    largest = sum(mask.shape)
    ends = []
    for values in (x[kept], y[kept], b[kept]):
        low = values.new_full((N,), largest)
        low.scatter_reduce_(0, number, values, "amin")
        high = values.new_zeros((N,))
        high.scatter_reduce_(0, number, values, "amax")
        ends.append((low, high))
    (x0, x1), (y0, y1), (owner, _) = ends
    box = torch.stack([x0, y0, x1 + 1, y1 + 1], dim=1)
    return Components(labels, owner, box)


def grid_points(count, device):
    """The middles of count equal parts of [0, 1]: (count,)."""
    return (torch.arange(count, device=device) + 0.5) / count


def crop_to_grid(components, grid_h, grid_w):
    """Samples each component's mask on a grid stretched over its box: (N, grid_h, grid_w) bool."""
    device = components.box.device
    x0, y0, x1, y1 = components.box[:, None].unbind(dim=2)  # (N, 1) each
    v = grid_points(grid_h, device)
    u = grid_points(grid_w, device)
    y = (y0 + v * (y1 - y0)).long()  # (N, grid_h)
    x = (x0 + u * (x1 - x0)).long()  # (N, grid_w)
    owner = rearrange(components.owner, "n -> n 1 1")
    y = rearrange(y, "n h -> n h 1")
    x = rearrange(x, "n w -> n 1 w")
    number = torch.arange(1, len(y) + 1, device=device)
    return components.labels[owner, y, x] == rearrange(number, "n -> n 1 1")


def overlap(masks, templates):
    """Intersection over union of masks (N, ...) and templates (M, ...), both bool: (N, M)."""
    a = masks.flatten(1).float()
    b = templates.flatten(1).float()
    intersection = a @ b.T
    area_a = a.sum(1, keepdim=True)  # (N, 1)
    area_b = b.sum(1)  # (M,)
    return intersection / (area_a + area_b - intersection)


def shape_templates(device):
    """The eight shapes on GRID x GRID points of their box: (8, GRID, GRID) bool."""
    line = grid_points(GRID, device) * 2 - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    distances = [inside(shape, u, v) for shape in CLASSES]
    return torch.stack(distances) >= 0


def nearest_colors(images, mask, components):
    """The palette number of each component's mean colour: (N,).

    The mean is over the component's interior: its edge pixels are mixed with the background.
    """
    background = 1 - mask.float()
    near_background = F.max_pool2d(background, 3, stride=1, padding=1)
    interior = near_background < 1
    weight = (components.labels > 0) * (interior + 1e-3)  # the edge counts where a shape has no interior
    weight = rearrange(weight, "b h w -> (b h w) 1")
    pixels = rearrange(images, "b c h w -> (b h w) c")
    weighted = torch.cat([pixels * weight, weight], dim=1)
    total = torch.zeros(len(components.box) + 1, 4, device=images.device)
    total.index_add_(0, components.labels.flatten(), weighted)
    color_sum, weight_sum = total[1:].split([3, 1], dim=1)  # without what is in no component
    mean = color_sum / weight_sum
    palette = torch.tensor(list(PALETTE.values()), device=images.device)
    return torch.cdist(mean, palette / 255).argmin(dim=1)


@torch.no_grad()
def detect(images):
    """Objects of each image. images (B, 3, H, W) float in [0, 1] -> one list of `Detection` per image.

    Boxes are in pixels, `score` is the template overlap, `color` a palette name, `place` one of PLACES. A
    component that is no shape (a bar, a thin blob, objects that touch) is left out; a compact blob may still
    pass as its nearest shape.
    """
    images = images.float()
    background = torch.tensor(BACKGROUND, device=images.device) / 255
    distance = (images - background.view(1, 3, 1, 1)).norm(dim=1)
    mask = distance > FOREGROUND_DISTANCE  # (B, H, W)
    detections = [[] for _ in images]
    components = measure_components(mask, MIN_AREA)
    box = components.box
    if len(box) == 0:
        return detections

    crops = crop_to_grid(components, GRID, GRID)
    similarity = overlap(crops, shape_templates(images.device))  # (N, 8)
    score, shape = similarity.max(dim=1)
    size = box[:, 2:] - box[:, :2]
    longest = size.max(1).values
    shortest = size.min(1).values
    is_shape = score >= MIN_OVERLAP
    is_shape &= longest <= MAX_ASPECT * shortest
    is_shape &= longest <= MAX_SIZE * images.shape[3]
    color = nearest_colors(images, mask, components)

    names = list(PALETTE)
    height, width = images.shape[2:]
    for n in is_shape.nonzero().flatten().tolist():
        corners = tuple(box[n].tolist())
        detection = Detection(
            class_name=CLASSES[int(shape[n])],
            box=corners,
            score=score[n].item(),
            color=names[int(color[n])],
            place=place_of(corners, width, height),
        )
        detections[int(components.owner[n])].append(detection)
    return detections

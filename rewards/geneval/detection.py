"""What GenEval's rule and its detectors share: a detection, and the benchmark's words. Imports nothing."""

from typing import NamedTuple


class Detection(NamedTuple):
    """An object that a detector found in an image."""

    class_name: str
    box: tuple  # in pixels: x0, y0, x1, y1
    score: float
    color: str | None


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = tuple(  # COCO's 80 in its order and GenEval's words: computer mouse, tv remote, computer keyboard
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush".split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16  # detections kept per class, best score first

"""The figures of the course: each is a function that returns a Picture, with its title, caption and
alt text."""

from lora_course.figures.bits import *
from lora_course.figures.capacity import *
from lora_course.figures.deeper import *
from lora_course.figures.fig01 import *
from lora_course.figures.fig02 import *
from lora_course.figures.fig03 import *
from lora_course.figures.fig04 import *
from lora_course.figures.fig05 import *
from lora_course.figures.fig06 import *
from lora_course.figures.fig07 import *
from lora_course.figures.fig_rewards import *
from lora_course.figures.real import *
from lora_course.figures.style import *
from lora_course.figures.which_variant import *
from lora_course.figures.writing import *

"""Parameter shapes of the models that step times are measured on."""

from optstate.models.families import named_shapes

Shapes = list[tuple[int, ...]]


def llama1b() -> Shapes:
    """TinyLlama 1.1B: 201 tensors, 1.10e9 parameters."""
    return named_shapes("tinyllama-1.1b")


def gpt2() -> Shapes:
    """GPT-2 small: 148 tensors, 124e6 parameters."""
    return named_shapes("gpt2")


def many() -> Shapes:
    """A thousand small matrices and a thousand vectors."""
    return [(128, 128)] * 1000 + [(128,)] * 1000


def resnet101() -> Shapes:
    """ResNet-101: 314 tensors, 44.5e6 parameters, most of them convolutions."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 23), (512, 3)):
        for block in range(blocks):
            kernels = [(width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                kernels.append((4 * width, inside, 1, 1))
            for kernel in kernels:
                shapes += [kernel, (kernel[0],), (kernel[0],)]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def cpu50m() -> Shapes:
    """A transformer of width 640: 98 tensors, 49.9e6 parameters, what a CPU can train."""
    layer: Shapes = [(640,), (640,), (1920, 640), (1920,), (640, 640), (640,)]
    layer += [(640,), (640,), (2560, 640), (2560,), (640, 2560), (640,)]
    return [(16384, 640), *layer * 8, (640,)]


def tiny() -> Shapes:
    """Ten tensors for trying the benchmark itself."""
    return [(64, 64)] * 5 + [(61,)] * 5


LAYOUTS = {f.__name__: f for f in (llama1b, gpt2, many, resnet101, cpu50m, tiny)}

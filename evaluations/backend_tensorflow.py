"""The TensorFlow engine: the frozen graph run as it is. The only file that imports TensorFlow."""

import os

import numpy as np

from esddpm_io.errors import UserError, first_line
from evaluations.graph_file import IMAGES_NODE, POOL_NODE, SPATIAL_NODE, Graph


class TensorFlowEngine:
    """Pool and spatial features of a frozen graph, float32, by TensorFlow."""

    name = "tensorflow"

    def __init__(self, graph: Graph):
        tf = _load_tensorflow()
        self._errors = tf.errors.OpError
        with open(graph.path, "rb") as stream:
            definition = tf.GraphDef.FromString(stream.read())
        with tf.Graph().as_default() as tf_graph:
            self._images = tf.placeholder(tf.float32, [None, None, None, 3])
            try:
                self._outputs = tf.import_graph_def(
                    definition,
                    input_map={f"{IMAGES_NODE}:0": self._images},
                    return_elements=[f"{POOL_NODE}:0", f"{SPATIAL_NODE}:0"],
                    name="",
                )
            except ValueError as error:
                raise UserError(f"--inception_path {graph.path}: {first_line(error)}") from error
        config = tf.ConfigProto(allow_soft_placement=True)
        config.gpu_options.allow_growth = True
        self._session = tf.Session(graph=tf_graph, config=config)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] -> outputs of the two nodes, float32 [N, h, w, channels] each."""
        try:
            return tuple(
                self._session.run(self._outputs, {self._images: images.astype(np.float32)})
            )
        except self._errors as error:
            raise UserError(f"the graph failed on {images.shape}: {first_line(error)}") from error


def has_gpu() -> bool:
    """Whether TensorFlow is there and would run on a GPU."""
    try:
        return bool(_load_tensorflow().config.list_physical_devices("GPU"))
    except UserError:
        return False


def _load_tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow loads
    try:
        import tensorflow.compat.v1 as tf
    except ImportError as error:
        raise UserError(
            f"--backend tensorflow: TensorFlow cannot be loaded ({error}); install it (pip "
            "install tensorflow-cpu) or use --backend torch"
        ) from error
    return tf

"""The published data sets that `data.load` knows by name: their hosts, digests and class names."""

from typing import NamedTuple

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class DataSet(NamedTuple):
    """A published data set of four IDX files.

    Attributes:
        name: Its name here and in TFDS.
        title: Its name in texts. Without the hyphen, the directory in which torchvision keeps it.
        class_names: Name of each class, by label.
        url: Where the four files can be downloaded, gzipped.
        megabytes: Size of the download.
        digests: SHA-256 of each file, uncompressed, because gzip headers differ from copy to copy. A name that ends in
            .gz stands for the published gzipped file, where only its digest is known.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    url: str
    megabytes: int
    digests: dict[str, str]


_TABLE = (
    DataSet(
        name="fashion_mnist",
        title="Fashion-MNIST",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        megabytes=31,
        digests={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    DataSet(
        name="mnist",
        title="MNIST",
        class_names=tuple("0123456789"),
        url="https://storage.googleapis.com/cvdf-datasets/mnist/",  # The authors' own host refuses downloads.
        megabytes=12,
        digests={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    DataSet(
        name="kmnist",
        title="KMNIST",
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        url="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        megabytes=21,
        digests={
            "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "train-labels-idx1-ubyte": "2a16eeae62da984b8bd24fa32e31d47291f01dac3fe84d5594f304f71e7d374b",
            "t10k-images-idx3-ubyte": "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
            "t10k-labels-idx1-ubyte": "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
        },
    ),
)
DATA_SETS: dict[str, DataSet] = {data_set.name: data_set for data_set in _TABLE}

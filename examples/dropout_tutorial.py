# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does dropout prevent overfitting?
#
# A network *overfits* when it goes on getting better on the images that it learns from, and gets worse on images that
# it has never seen. *Dropout* is a common remedy: at each training step, switch off a random part of the hidden units.
#
# A well-known PyTorch tutorial trains one small network without dropout and one with it, draws two plots, and concludes
# that dropout prevents overfitting. This notebook repeats its experiment in JAX, and then asks how much two plots can
# prove.
#
# You need some Python, and an idea of what a neural network is. You need no JAX. On two CPU cores all cells together
# take a few minutes, and nearly all of that is one cell, in part 5.
#
# 1. The images
# 2. The network, by hand
# 3. Dropout, by hand
# 4. Training, step by step
# 5. Training without and with dropout
# 6. The two plots, and what is wrong with them
# 7. What the network says of one image
# 8. Does dropout prevent overfitting?
# 9. The rival: stopping early
# 10. Exercises

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display, update_display

from fashion_jax import CLASS_NAMES, Batch, Dropout, FashionMLP, TrainConfig
from fashion_jax.data import load, subset
from fashion_jax.evidence import best_epochs, interval, judge, paired
from fashion_jax.plot import classification, image_sheet, losses
from fashion_jax.predict import predict
from fashion_jax.report import markdown, mean_and_sd, table, verdicts
from fashion_jax.sweep import sweep, use_all_cores
from fashion_jax.train import init_state, negative_log_likelihood, train_step

use_all_cores()  # before JAX computes anything

# %% [markdown]
# These three numbers decide how long the notebook runs. Make them smaller for a quick look; part 4 needs at least 6,400
# images.

# %% tags=["parameters"]
SEEDS = range(4)  # how often each network is trained
EPOCHS = 30  # how often a network sees each image
IMAGES = 60_000  # how many images it learns from

# %% [markdown]
# ## 1. The images
#
# Fashion-MNIST holds small grey pictures of clothes, each with a label: one of ten classes. The network learns from the
# training images. The test images are kept apart, to see how it does on what it has not learned from.
#
# `load` finds the data on your machine, or downloads them. `subset` takes a random part, with as many images of each
# class as of any other; as long as `IMAGES` is 60,000 it takes them all.

# %%
train, test = load()
train = subset(train, IMAGES, key=jax.random.key(0))
print("training images:", train.images.shape, train.images.dtype)
print("test images:    ", test.images.shape, test.images.dtype)
print("images a class: ", np.bincount(train.labels))
print("classes:        ", ", ".join(CLASS_NAMES))

# %% [markdown]
# An image is 28 rows of 28 pixels, each a whole number from 0 (black) to 255 (white). Here are the first 900.

# %%
display(image_sheet(train.images[:900]))

# %% [markdown]
# Look for a shirt, a coat and a pullover. Some are hard to tell apart even for us, so do not expect a network that is
# always right.

# %% [markdown]
# ## 2. The network, by hand
#
# The network is a chain of four *linear layers*. Each computes `x @ kernel + bias`. After each of the first three comes
# a *ReLU*, which replaces negative numbers by 0; what comes out of it are the *hidden units*.
#
# In JAX a model holds no weights. They live in a dictionary of arrays, and you pass them to every function that needs
# them. `init_state` draws them at random.

# %%
config = TrainConfig()
state = init_state(jax.random.key(0), config=config)
for name, layer in state.params.items():
    print(name, "kernel", layer["kernel"].shape, "bias", layer["bias"].shape)
print("numbers to learn:", sum(leaf.size for leaf in jax.tree.leaves(state.params)))

# %% [markdown]
# Let us send one image through the layers with NumPy alone. Pixels are first moved from 0..255 to -1..1.

# %%
image, label = train.images[0], train.labels[0]
params = jax.device_get(state.params)

x = (image.reshape(784) / 255 - 0.5) / 0.5
for name in ("fc1", "fc2", "fc3"):
    x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
scores = x @ params["fc4"]["kernel"] + params["fc4"]["bias"]
print("scores:", scores.round(3))

# %% [markdown]
# Ten scores come out, one a class; the highest is the network's guess. To make probabilities of them, take the
# exponential of each and divide by the sum: that is the *softmax*. Its logarithm, the *log-softmax*, is a subtraction.

# %%
log_probs = scores - np.log(np.exp(scores).sum())
print("log-probabilities:", log_probs.round(3))
print("probabilities:    ", np.exp(log_probs).round(3))
print("their sum:        ", np.exp(log_probs).sum().round(3))

# %% [markdown]
# The *loss* tells how wrong the network is: take the log-probability of the right class, and change its sign. That is
# the *negative log likelihood*. It is 0 if the network is sure and right, and large if it is sure and wrong. Its unit
# is the *nat*.

# %%
print("right class:", CLASS_NAMES[label])
print(f"loss by hand:          {-log_probs[label]:.4f} nats")

# jit compiles a function, so that it runs fast
network = jax.jit(FashionMLP(dropout_rate=0.2).apply, static_argnames="deterministic")
log_probs = network({"params": state.params}, image[None], deterministic=True)
print(f"loss by fashion_jax:   {negative_log_likelihood(log_probs, label[None])[0]:.4f} nats")
print(f"loss of blind guesses: {np.log(10):.4f} nats")

# %% [markdown]
# Our loss and the package's agree. The network has learned nothing yet, so it is about as good as one that gives each
# of the ten classes the same probability.

# %% [markdown]
# ## 3. Dropout, by hand
#
# During training, dropout sets each hidden unit to 0 with probability 0.2, and multiplies the others by 1 / (1 - 0.2),
# so that the sum stays the same on average. Which units are dropped is drawn anew at each step: that is the *mask*. No
# unit can rely on a certain other one being there.
#
# Where does the randomness come from? JAX has no hidden random state. You pass a *key*, and **the same key gives the
# same numbers**, always.


# %%
def drop(key, rate=0.2, units=10):
    return np.array(Dropout(rate).apply({}, jnp.ones(units), deterministic=False, rngs={"dropout": key}))


print("key 1:      ", drop(jax.random.key(1)))
print("key 1 again:", drop(jax.random.key(1)))
print("key 2:      ", drop(jax.random.key(2)))
print("mean of a million ones:", drop(jax.random.key(1), units=1_000_000).mean())

# %% [markdown]
# Here are masks for the 256 hidden units of the first layer, as squares of 16 by 16. Black units are dropped.

# %%
figure, panels = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
masks = {"key 1": (1, 0.2), "key 1 again": (1, 0.2), "key 2": (2, 0.2), "key 1, rate 0.5": (1, 0.5)}
for axes, (title, (seed, rate)) in zip(panels, masks.items(), strict=True):
    kept = drop(jax.random.key(seed), rate, units=256) > 0
    axes.imshow(kept.reshape(16, 16), cmap="gray", vmin=0, vmax=1)
    axes.set_title(f"{title}\n{256 - kept.sum()} of 256 dropped", fontsize=10)
    axes.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The first two are equal. Compare the first with the last: with the same key, what the lower rate drops, the higher
# rate drops too.
#
# When the network is used, nothing may be random. That is what `deterministic=True` is for: dropout then does nothing.
# With `deterministic=False` the model needs a key. Here is the loss of our one image, in nats, with dropout off and on.


# %%
def loss_with(**how):
    log_probs = network({"params": state.params}, image[None], **how)
    return negative_log_likelihood(log_probs, label[None])[0]


print("dropout off:             ", loss_with(deterministic=True))
print("dropout on, key 1:       ", loss_with(deterministic=False, rngs={"dropout": jax.random.key(1)}))
print("dropout on, key 1 again: ", loss_with(deterministic=False, rngs={"dropout": jax.random.key(1)}))
print("dropout on, key 2:       ", loss_with(deterministic=False, rngs={"dropout": jax.random.key(2)}))

# %% [markdown]
# ## 4. Training, step by step
#
# One training step takes a *batch* of 64 images, computes their mean loss with dropout on, asks which small change of
# each weight would lower it (the *gradient*), and changes the weights a little. How far each weight moves is decided by
# *Adam*, a common recipe.
#
# `train_step` is a pure function: it changes nothing, and returns the next state.

# %%
batch = Batch(train.images[:64], train.labels[:64])
after, metrics = train_step(state, batch, jax.random.key(1), config=config, dropout_rate=0.2)
print("steps taken, before and after:", state.step, after.step)
print(f"loss of the batch: {metrics.loss:.4f} nats; accuracy: {metrics.accuracy:.4f}")

# %% [markdown]
# The key decides the masks, and nothing else. So the same key gives the same step, and without dropout the key does not
# matter. The last column compares the kernel of the first layer after the step.

# %%
rows = [("dropout rate", "key", "loss of the batch (nats)", "same weights as in the row above")]
above = None
for rate, seed in [(0.2, 1), (0.2, 1), (0.2, 2), (0.0, 1), (0.0, 2)]:
    key = jax.random.key(seed)
    after, metrics = train_step(state, batch, key, config=config, dropout_rate=rate)
    kernel = after.params["fc1"]["kernel"]
    same = "" if above is None else "yes" if np.array_equal(kernel, above) else "no"
    rows.append((f"{rate:g}", f"{seed}", f"{metrics.loss:.6f}", same))
    above = kernel
display(Markdown(markdown(rows)))

# %% [markdown]
# Training is this step, again and again, with another batch and another key each time. `fold_in` makes a new key from a
# key and a number. A hundred steps:

# %%
key = jax.random.key(1)
for number in range(100):
    part = slice(64 * number, 64 * (number + 1))
    batch = Batch(train.images[part], train.labels[part])
    step_key = jax.random.fold_in(key, number)
    state, metrics = train_step(state, batch, step_key, config=config, dropout_rate=0.2)
    if number in (0, 9, 99):
        print(f"step {number + 1:3}: loss {metrics.loss:.4f} nats, accuracy {metrics.accuracy:.4f}")

# %% [markdown]
# The loss falls. An *epoch* is as many steps as it takes to see every image once, in a new random order.

# %% [markdown]
# ## 5. Training without and with dropout
#
# `fit` trains one network for many epochs. We want several, because one network may be lucky. `sweep` trains one for
# each pair of a dropout rate and a *seed*, the number that its key is made of. Networks of one seed have the same
# initial weights and the same order of images, whatever their dropout rate, so that comparing them is fair.
#
# After each epoch every network is measured on the test images. The tutorial calls this *validation*.
#
# This is the cell that takes long.


# %%
def show(end):
    without, with_dropout = end.history.validation.loss.mean(axis=1)
    figures = f"{without:.4f} without dropout, {with_dropout:.4f} with it"
    line = f"epoch {end.epoch} of {end.epochs}, mean validation loss: {figures}"
    update_display(Markdown(line), display_id="progress")


display(Markdown("the first epoch takes longest: JAX compiles"), display_id="progress")
run = sweep(train, test, seeds=SEEDS, dropout_rates=(0.0, 0.2), epochs=EPOCHS, on_epoch=show)

# %% [markdown]
# Every measure is now an array with one number for each rate, seed and epoch. We take them apart by rate;
# `jax.tree.map` does the same with every array of a nested structure.

# %%
print("rates, seeds, epochs:", run.history.validation.loss.shape)
plain = jax.tree.map(lambda leaf: leaf[0], run.history)
dropout = jax.tree.map(lambda leaf: leaf[1], run.history)
arms = {"no dropout": plain, "dropout 0.2": dropout}

# %% [markdown]
# ## 6. The two plots, and what is wrong with them
#
# The tutorial trains each network once, and draws two curves: the loss on the training images, averaged over the epoch
# *while training is under way*, and the loss on the validation images after the epoch. So do we, with our first seed.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, (title, history) in zip(panels, arms.items(), strict=True):
    epochs = np.arange(1, len(history.running_loss[0]) + 1)
    axes.plot(epochs, history.running_loss[0], ":", color="#c4482e", lw=2, label="training")
    axes.plot(epochs, history.validation.loss[0], color="#123a6d", label="validation")
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("loss (nats), one run")
panels[1].legend()
plt.show()

# %% [markdown]
# On the left the curves part: that is overfitting. On the right they stay close together. It looks as if dropout had
# all but closed the gap.
#
# But the training curve is not measured like the validation curve, in two ways:
#
# - **Dropout is on.** The network is measured with a fifth of its hidden units missing, which makes it look worse than
#   it is.
# - **The weights still move.** The average reaches back to the beginning of the epoch, when the network was worse.
#
# How much the first one matters is quickly measured. Take a network that was trained with dropout, and measure its loss
# on the same training images twice.

# %%
params = jax.tree.map(lambda leaf: leaf[1, 0], run.state.params)
images, labels = train.images[:5_000], train.labels[:5_000]
off = network({"params": params}, images, deterministic=True)
on = network({"params": params}, images, deterministic=False, rngs={"dropout": jax.random.key(0)})
print(f"training loss, dropout off: {negative_log_likelihood(off, labels).mean():.4f} nats")
print(f"training loss, dropout on:  {negative_log_likelihood(on, labels).mean():.4f} nats")

# %% [markdown]
# The difference is dropout's doing alone; the weights are the same. The fair way is to measure training images as
# validation images are measured: after the epoch, with dropout off. `sweep` has done that too, on a fixed part of the
# training images.
#
# Here are all three curves, over all seeds: a line is the mean, and the band around it is one standard deviation to
# each side. The ring is at the lowest mean validation loss.

# %%
display(losses(arms))

# %% [markdown]
# With dropout, the dashed curve lies well below the dotted one, so there is a gap on the right too; the tutorial's way
# of measuring hides most of it. Without dropout only the moving weights set the two training curves apart. In numbers,
# after the last epoch:

# %%
rows = [("validation loss minus training loss", "as in the tutorial", "fair: dropout off in both")]
for title, arm in arms.items():
    tutorial = arm.validation.loss[:, -1] - arm.running_loss[:, -1]
    fair = arm.validation.loss[:, -1] - arm.train.loss[:, -1]
    rows.append((title, mean_and_sd(tutorial), mean_and_sd(fair)))
display(Markdown(markdown(rows)))

# %% [markdown]
# And this is everything, at the last epoch and at each run's epoch with the lowest validation loss; losses are in nats:

# %%
display(Markdown(table(arms)))

# %% [markdown]
# ## 7. What the network says of one image
#
# Here is the first test image, with the ten probabilities that a network trained with dropout gives. The bar of the
# right class is hatched.

# %%
probabilities = predict(params, test.images)


def picture(i):
    label = int(test.labels[i])
    return classification(test.images[i], probabilities[i], class_names=CLASS_NAMES, label=label)


display(picture(0))

# %% [markdown]
# And here is the first test image that the same network gets wrong. Would you have known? And look at how sure the
# network is.

# %%
wrong = np.flatnonzero(probabilities.argmax(axis=1) != test.labels)
print(f"wrong: {len(wrong)} of {len(test.labels)} test images, the first of them number {wrong[0]}")
display(picture(wrong[0]))

# %% [markdown]
# ## 8. Does dropout prevent overfitting?
#
# Look at the final loss of each seed, and at the difference that dropout makes.

# %%
without, with_dropout = plain.validation.loss[:, -1], dropout.validation.loss[:, -1]
difference = with_dropout - without
rows = [("seed", "final validation loss without dropout", "with dropout", "difference")]
for i, seed in enumerate(SEEDS):
    rows.append((f"{seed}", f"{without[i]:.4f}", f"{with_dropout[i]:.4f}", f"{difference[i]:+.4f}"))
display(Markdown(markdown(rows)))

# %% [markdown]
# The seeds do not agree on the size of the difference. Another seed would give yet another number, so no single run can
# tell how much dropout helps: part of what it shows is luck.
#
# What we can estimate is the *mean* difference over all seeds that there could be. A **95% confidence interval** is a
# range that is computed so that, of a hundred such experiments, about 95 would have that mean inside theirs. The more
# the seeds differ, and the fewer there are, the wider it gets. This is the mean difference, with its interval in
# brackets:

# %%
print(f"with dropout minus without, {len(difference)} seeds:", interval(difference))

# %% [markdown]
# If the whole interval lies below 0, luck is a poor explanation for a lower loss. If 0 lies inside, these seeds do not
# tell which of the two networks is better. That is not the same as "they are equally good".
#
# "Dropout prevents overfitting" can mean several things. `judge` takes the tutorial's words apart into claims, and
# gives one of three answers to each:
#
# - **supported**: the whole interval lies on the side of the claim;
# - **refuted**: the whole interval lies on the other side;
# - **undecided**: the interval lies on both sides. More seeds might decide.
#
# A rise or a gap of less than 0.02 nats counts as none, and "early" means in the first half of the epochs.

# %%
display(Markdown(verdicts(judge(plain, dropout))))

# %% [markdown]
# Take your time with this table; it is what the experiment says.
#
# - In the pictures the validation loss without dropout falls, turns, and rises; with dropout it ends lower. So few
#   seeds may leave undecided whether the rise is more than 0.02. The 32 seeds of the [README](../README.md) decide it:
#   without dropout it is, with dropout it is not. In that sense dropout does prevent overfitting.
# - It narrows the gap between training and validation, but does not close it.
# - Nothing says that it raises the accuracy. How can the loss get better and the accuracy not? Accuracy asks only
#   whether the most probable class is the right one; the loss also asks how probable the network took it to be. In the
#   last table of part 6, compare "last" with "best" for the network without dropout: its loss gets worse, its accuracy
#   hardly moves. What overfitting spoils here is less the answers than the sense of how sure to be of them.
# - Where the answer is "undecided", we must not say more.
#
# Do not trust the table blindly either. Few seeds make shaky intervals, and of many 95% intervals one in twenty misses.

# %% [markdown]
# ## 9. The rival: stopping early
#
# There is another remedy against a loss that rises late: stop before it does. Keep the weights of the epoch with the
# lowest validation loss (`run.best.params` holds them), and forget what came after. It costs no computing, but it
# is not free: over the many seeds of the project's README, the plain network is less accurate where its loss is lowest
# than in the end.
#
# A fair comparison needs care. The lowest of thirty noisy numbers is low partly by luck. So we let half of the seeds
# choose the epoch at which the other half is stopped, and the other way round: their luck is not its own.

# %%
chosen = best_epochs(plain.validation.loss)
stopped = plain.validation.loss[np.arange(len(chosen)), chosen]
rows = [("seed", "stopped after epoch", "its loss", "not stopped", "dropout, not stopped")]
for i, seed in enumerate(SEEDS):
    three = f"{stopped[i]:.4f}", f"{without[i]:.4f}", f"{with_dropout[i]:.4f}"
    rows.append((f"{seed}", f"{chosen[i] + 1}", *three))
display(Markdown(markdown(rows)))
print("dropout, not stopped, minus no dropout, stopped:", paired(with_dropout, stopped))

# %% [markdown]
# Stopping early takes away much of the late rise, and without any dropout. Does dropout still do better? The interval
# under the table says how that stands, for dropout trained to the end. The row on stopping early in part 8 compares the
# two networks when *both* are stopped. As long as 0 lies inside, these seeds give no reason to prefer dropout to
# stopping early. The 32 seeds of the README do decide that row: stopped, the network *without* dropout has the lower
# loss.
#
# One thing remains unfair. We chose the epoch by the test images, and then measured on the same images. For an honest
# number, set part of the *training* images aside, choose by them, and use the test images once, at the very end. The
# third exercise does that.
#
# ### So, does it?
#
# Yes, in the sense that it keeps the loss from rising late. No, if you hoped for more right answers. And the two plots
# that we began with could not have told: they show one seed, and a training curve that is measured in another way than
# the curve beside it.
#
# All of this is said of one network, one data set and one dropout rate. The [README](../README.md) of this project has
# the same table of claims for many more seeds.

# %% [markdown]
# ## 10. Exercises
#
# Each needs only what the package offers. `help(name)` shows what a function takes.
#
# 1. **No key.** Call `network` with `deterministic=False` and no `rngs`. What happens, and why is that better than to
#    draw some mask anyway?
# 2. **More dropout.** Run `sweep` with `dropout_rates=(0.0, 0.5)` and ten epochs. What becomes of the gap, and of the
#    accuracy?
# 3. **Honest early stopping.** Split the training images with `fashion_jax.hold_out`, train with `fashion_jax.fit` on
#    the larger part and validate on the other. Then measure `run.best.params` and `run.state.params` on the test images
#    with `fashion_jax.train.evaluate`, once.
# 4. **Fewer images.** Give `sweep` the argument `train_sizes=(1_000, 10_000)`. With which number of images does dropout
#    change the final loss more? `fashion_jax.evidence.summarise` computes it.
# 5. **A wider network.** Train with `config=TrainConfig(hidden=(1024, 512, 256))` and judge again. Which answers
#    change? (Be patient, or use fewer epochs.)
# 6. **Fewer seeds, other seeds.** Compute `interval(difference[:2])`, then of three seeds, and so on. How does the
#    width shrink? Then set `SEEDS = range(4, 8)`, run everything again, and see which answers change.
# 7. **The same bytes.** Train twice with `fit` and the same key, for two epochs, and compare all parameters with
#    `np.array_equal`. Then change the key.
# 8. **Many thinned networks.** Keep dropout on when predicting: `fashion_jax.predict_mc` does so many times over. Draw
#    the image that was wrong with `classification(..., spread=...)`. Is the network less sure of it than of the first
#    image?
# 9. **Your own clothes.** Photograph a shoe on a plain background, read the file with `fashion_jax.read_image`, and
#    classify it.

() => {
  // Shows the label and score of the region under the pointer or finger.
  const tip = Object.assign(document.createElement("div"), { id: "tip", hidden: true });
  document.body.append(tip);
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const covers = (mask, x, y) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.drawImage(mask, -x, -y);
    return pixel.getImageData(0, 0, 1, 1).data[3] > 0;
  };
  const look = (event) => {
    const view = event.target.closest?.(".image-container");
    const base = view?.querySelector("img.base-image");
    let name = "";
    if (base?.naturalWidth) {
      const box = base.getBoundingClientRect();
      const scale = Math.min(box.width / base.naturalWidth, box.height / base.naturalHeight);
      const x = Math.floor((event.clientX - box.left - box.width / 2) / scale + base.naturalWidth / 2);
      const y = Math.floor((event.clientY - box.top - box.height / 2) / scale + base.naturalHeight / 2);
      const names = view.parentElement.querySelectorAll(".legend-item");
      const index = [...view.querySelectorAll("img.mask")].findIndex((mask) => covers(mask, x, y));
      name = names[index]?.textContent ?? "";
    }
    tip.textContent = name;
    tip.hidden = !name;
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 12, 0)}px`;
  };
  document.addEventListener("pointermove", look);
  document.addEventListener("pointerdown", look);
  document.addEventListener("scroll", () => (tip.hidden = true), true);

  // Before a request: close old error messages, and scroll to the results if they are off screen, as on a phone.
  window.showResults = () => {
    document.querySelectorAll(".toast-close").forEach((button) => button.click());
    const results = document.getElementById("results");
    const { top } = results.getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) results.scrollIntoView({ behavior: "smooth" });
  };
}

{
  // Without this all examples stand below each other; with it, the one that is picked.
  const pick = document.getElementById("example");
  if (pick) {
    const show = () => {
      for (const one of document.querySelectorAll(".example")) one.hidden = one.id !== "example-" + pick.value;
    };
    pick.closest(".pick").hidden = false;
    document.documentElement.classList.add("picking");
    pick.addEventListener("change", show);
    show();
  }
}
